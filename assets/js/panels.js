/* Around the map: the token strip, where a row looks, the heads of the layer, the largest weights.
   Needs `S` from attention.js. */
const strip = h("div", {class: "tokstrip", role: "group", "aria-label": "tokens of the run, arrow keys move"});
const bars = h("div", {class: "bars"}), figures = h("div", {class: "heads"});
let stripFrom = 0, stripTo = 0, rowAsk = 0, shownRow = null;

function buildStrip(around) {
  const n = S.tokens.length, most = 1600;
  const a = n <= most ? 0 : Math.max(0, Math.min(n - most, around - most / 2 | 0)), b = Math.min(n, a + most);
  if (a === stripFrom && b === stripTo && strip.childElementCount) return;
  stripFrom = a; stripTo = b;
  swap(strip, a > 0 ? h("span", {class: "soft"}, `… ${fmt.int(a)} before `) : "", ...S.tokens.slice(a, b).map((t, k) => {
    const i = a + k, kind = (i >= S.now.prompt ? " gen" : "") + (i === S.now.prompt ? " first" : "");
    const span = h("span", {class: "tk" + kind, "data-i": i, tabindex: i === around ? "0" : "-1"});
    span.textContent = /^\s*$/.test(t) ? fmt.tok(t) : t.replace(/\n/g, "⏎"); return span;
  }), b < n ? h("span", {class: "soft"}, ` … ${fmt.int(n - b)} after`) : "");
}
const tokenAt = i => strip.querySelector(`[data-i="${i}"]`);
function markStrip(answer) {
  const others = answer.profile.filter((_, k) => S.minus || answer.strip[0] + k > 0).map(Math.abs);
  const top = others.reduce((a, b) => Math.max(a, b), 1e-9), gone = new Set(answer.gone);
  for (const span of strip.querySelectorAll(".tk")) {
    const i = Number(span.dataset.i), w = answer.profile[i - answer.strip[0]] || 0;
    span.style.setProperty("--w", i > answer.row ? 0 : Math.min(1, Math.sqrt(Math.abs(w) / top)) * .72);
    span.classList.toggle("less", w < 0); span.classList.toggle("gone", gone.has(i));
    span.classList.toggle("later", i > answer.row); span.classList.toggle("q", i === answer.row);
  }
}
strip.addEventListener("click", e => { const t = e.target.closest(".tk"); if (t) S.chooseRow(Number(t.dataset.i), true, tokbox); });
strip.addEventListener("mouseover", e => {
  const t = e.target.closest(".tk"); if (t && !S.pin) { S.cursor = {row: S.row, col: Number(t.dataset.i)}; draw(); }
});
strip.addEventListener("keydown", e => {
  const t = e.target.closest(".tk"); if (!t) return; const i = Number(t.dataset.i), last = S.tokens.length - 1;
  if (e.key === "Enter" || e.key === " ") { e.preventDefault(); S.chooseRow(i, true, tokbox); return; }
  if (e.key === "Escape") { S.setPin(null); return; }
  const to = {ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + 12, ArrowUp: i - 12, Home: 0, End: last}[e.key];
  if (to === undefined) return;
  e.preventDefault(); const next = tokenAt(Math.max(0, Math.min(last, to)));
  if (next) { t.tabIndex = -1; next.tabIndex = 0; next.focus(); }
});

const askRow = debounce(async i => {
  const mine = ++rowAsk, a = await server.row({...S.ask(), row: i, top: 12, strip: [stripFrom, stripTo]}).catch(() => null);
  if (mine !== rowAsk || !a) return;
  if (a.error) { swap(bars, h("p", {class: "soft"}, S.replaying() ? S.waits() : a.error)); return; }
  markStrip(a); drawBars(a);
}, 45);
function rowChanged(i, scroll) {
  buildStrip(i); shownRow = i; askRow(i);
  const t = scroll ? tokenAt(i) : null;
  if (t) strip.scrollTop = Math.max(0, t.offsetTop - strip.clientHeight / 2);
}
const bitClass = b => b === null || b === undefined ? "b16" : `b${b}`;
function drawBars(a) {
  const top = Math.max(1e-9, ...a.bars.map(b => Math.abs(b.weight)), a.tail || 0), text = S.minus ? signed : w => fmt.dec(w, 3);
  const rolled = S.head === "rollout", colour = b => S.minus ? b.weight < 0 ? "divless" : "divmore" : `bits ${bitClass(b.bits)}`;
  const name = S.minus ? `Where ${S.letter} and ${S.minus} differ: ` : rolled ? "What is in " : "Where ";
  const several = b => b.cols && b.cols[1] - b.cols[0] > 1, tokens = b => `${fmt.int(b.cols[0])} to ${fmt.int(b.cols[1] - 1)}`;
  const bar = b => h("tr", {},
    h("td", {}, h("button", {type: "button", class: "quiet", onclick: () => S.setPin({row: a.row, col: b.col}, true),
      title: several(b) ? S.tokens.slice(...b.cols).join("") : `token ${fmt.int(b.col)}`},
      several(b) ? tokens(b) : b.col === 0 ? "token 0" : fmt.tok(S.tokens[b.col]))),
    h("td", {}, h("i", {class: colour(b), style: `width:${Math.abs(b.weight) / top * 100}%`})),
    h("td", {class: "num"}, text(b.weight)));
  swap(bars, h("div", {class: "h"}, name, h("code", {}, fmt.tok(S.tokens[a.row])), S.minus || rolled ? " " : " looks ",
    h("span", {class: "num"}, `row ${fmt.int(a.row)}`)),
    S.minus && !a.bars.length ? h("p", {class: "soft note"}, `Nothing differs on this row: ${S.letter} and ${S.minus} give every `
      + `token the same weight.${a.row < S.now.prompt ? " It is a row of the prompt." : ""}`) : null,
    h("table", {}, h("caption", {class: "sr"}, "largest attention weights of this row"), h("tbody", {}, a.bars.map(bar),
      a.others > 0 ? h("tr", {}, h("td", {class: "soft"}, `${fmt.int(a.others)} other${a.group > 1 ? " groups" : "s"}`),
        h("td", {}, h("i", {class: "tailbar", style: `width:${(a.tail || 0) / top * 100}%`})),
        h("td", {class: "num"}, fmt.dec(a.tail, 3))) : null)),
    a.lost ? h("p", {class: "soft lostline"}, h("s", {class: "bits b0"}),
      `${fmt.int(a.lost)} earlier tokens are evicted and get no weight.`) : null);
}
let statsAsk = 0;
const HEADINGS = [["head", "query head → KV head"], ["entropy", "nats, mean over rows"],
  ["sink rate", "share of rows with more than 0.3 on token 0"], ["distance", "mean tokens between a row and what it reads"]];
async function drawHeads() {
  const mine = ++statsAsk, a = await server.stats(S.ask()).catch(() => null);
  if (mine !== statsAsk || !a) return;
  if (a.error) { figures.replaceChildren(); return; }
  const per = S.now.heads / S.now.kv_heads, rate = i => a.sink_rate[i];
  const row = (e, i) => h("tr", {class: S.head === i && !S.over ? "on" : "", onclick: () => S.choose({head: i, over: null})},
    h("td", {}, h("button", {type: "button", class: "quiet num", "data-key": `head-${i}`,
      "aria-pressed": String(S.head === i)}, `${i} → ${Math.floor(i / per)}`)),
    h("td", {class: "num"}, fmt.dec(e, 2)),
    h("td", {class: "num"}, h("i", {class: "minibar", style: `width:${(rate(i) || 0) * 28}px`}),
      rate(i) === null ? "–" : rate(i).toFixed(2)),
    h("td", {class: "num"}, fmt.int(a.mean_distance[i])));
  swap(figures, h("div", {class: "h"}, `Heads of layer ${S.layer} · `,
    S.minus ? `${S.letter} alone` : S.letter), h("table", {},
    h("thead", {}, h("tr", {}, HEADINGS.map(([name, title]) => h("th", {scope: "col", title}, name)))),
    h("tbody", {}, a.entropy.map(row))));
}

/* The table behind the map: computed when it is opened, and again when the view has moved. */
const largebody = h("div"), large = h("details", {class: "figtable"}, h("summary", {}, "Table: largest weights in sight"),
  largebody);
let largeAsk = 0;
const drawLarge = debounce(async () => {
  if (!large.open || !S.now) return;
  const mine = ++largeAsk, view = {rows: [Math.floor(V.r), Math.ceil(V.r + V.span)],
    cols: [Math.floor(V.c), Math.ceil(V.c + V.span)]};
  const a = await server.largest({...S.ask(), ...view}).catch(() => ({error: LOST}));
  if (mine !== largeAsk) return;
  if (a.error) { swap(largebody, h("p", {class: "soft note"}, a.error)); return; }
  const span = ([x, y]) => y - x === 1 ? fmt.int(x) : `${fmt.int(x)} to ${fmt.int(y - 1)}`;
  const word = ([x, y]) => y - x === 1 ? h("code", {}, " ", fmt.tok(S.tokens[x])) : null;
  swap(largebody, h("p", {class: "soft note"}, "The first column (token 0 and its cell) is left out: it would fill the table."),
    h("div", {class: "tablebox tall"}, h("table", {class: "lines"}, h("caption", {class: "sr"}, "largest weights in sight"),
      h("thead", {}, h("tr", {}, ["row", "column", S.minus ? "difference" : S.head === "rollout" ? "share" : "weight"].map(t =>
        h("th", {scope: "col"}, t)))),
      h("tbody", {}, a.cells.map(c => h("tr", {},
        h("th", {scope: "row"}, h("button", {type: "button", class: "link num",
          onclick: () => S.setPin({row: c.rows[0], col: c.cols[0]}, true)}, span(c.rows)), word(c.rows)),
        h("td", {class: "num"}, span(c.cols), word(c.cols)), h("td", {class: "num"}, fmt.dec(c.weight, 3))))))));
}, 200);
large.addEventListener("toggle", drawLarge);
