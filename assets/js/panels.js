/* Around the map: token strip, where a row looks, the heads of the layer, and the cache map. Needs `S` from attention.js. */
const strip = h("div", {class: "tokstrip", role: "group", "aria-label": "tokens of the run, arrow keys move"});
const bars = h("div", {class: "bars"}), figures = h("div", {class: "heads"}), lifebox = h("div", {class: "life"});
let stripFrom = 0, stripTo = 0, rowAsk = 0, shownRow = null;

function buildStrip(around) {
  const n = S.tokens.length, most = 1600;
  const a = n <= most ? 0 : Math.max(0, Math.min(n - most, around - most / 2 | 0)), b = Math.min(n, a + most);
  if (a === stripFrom && b === stripTo && strip.childElementCount) return;
  stripFrom = a; stripTo = b;
  swap(strip, a > 0 ? h("span", {class: "soft"}, `… ${fmt.int(a)} before `) : "", ...S.tokens.slice(a, b).map((t, k) => {
    const i = a + k, span = h("span", {class: "tk" + (i >= S.now.prompt ? " gen" : "") + (i === S.now.prompt ? " first" : ""), "data-i": i, tabindex: i === around ? "0" : "-1"});
    span.textContent = /^\s*$/.test(t) ? fmt.tok(t) : t.replace(/\n/g, "⏎"); return span; }),
    b < n ? h("span", {class: "soft"}, ` … ${fmt.int(n - b)} after`) : "");
}
const tokenAt = i => strip.querySelector(`[data-i="${i}"]`);
function markStrip(answer) {
  const top = Math.max(1e-9, ...answer.profile.filter((_, k) => S.minus || answer.strip[0] + k > 0).map(Math.abs)), gone = new Set(answer.gone);
  for (const span of strip.querySelectorAll(".tk")) {
    const i = Number(span.dataset.i), w = answer.profile[i - answer.strip[0]] || 0;
    span.style.setProperty("--w", i > answer.row ? 0 : Math.min(1, Math.sqrt(Math.abs(w) / top)) * .72); span.classList.toggle("less", w < 0);
    span.classList.toggle("gone", gone.has(i)); span.classList.toggle("later", i > answer.row); span.classList.toggle("q", i === answer.row);
  }
}
strip.addEventListener("click", e => { const t = e.target.closest(".tk"); if (t) S.chooseRow(Number(t.dataset.i), true); });
strip.addEventListener("mouseover", e => { const t = e.target.closest(".tk"); if (t && !S.pin) { S.cursor = {row: S.row, col: Number(t.dataset.i)}; draw(); } });
strip.addEventListener("keydown", e => { const t = e.target.closest(".tk"); if (!t) return; const i = Number(t.dataset.i);
  const to = {ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + 12, ArrowUp: i - 12, Home: 0, End: S.tokens.length - 1}[e.key];
  if (e.key === "Enter" || e.key === " ") { e.preventDefault(); S.chooseRow(i, true); return; }
  if (to === undefined) return; e.preventDefault(); const next = tokenAt(Math.max(0, Math.min(S.tokens.length - 1, to)));
  if (next) { t.tabIndex = -1; next.tabIndex = 0; next.focus(); } });

const askRow = debounce(async i => {
  const mine = ++rowAsk, a = await server.row({...S.ask(), row: i, top: 12, strip: [stripFrom, stripTo]}).catch(() => null);
  if (mine !== rowAsk || !a) return;
  if (a.error) { swap(bars, h("p", {class: "soft"}, a.error)); return; }
  markStrip(a); drawBars(a);
}, 45);
function rowChanged(i, scroll) {
  buildStrip(i); shownRow = i; askRow(i);
  if (scroll) { const t = tokenAt(i); if (t) strip.scrollTop = Math.max(0, t.offsetTop - strip.clientHeight / 2); }
}
const bitClass = b => b === null || b === undefined ? "b16" : `b${b}`;
function drawBars(a) {
  const top = Math.max(1e-9, ...a.bars.map(b => Math.abs(b.weight)), a.tail || 0), text = S.minus ? signed : w => fmt.dec(w, 3);
  swap(bars, h("div", {class: "h"}, S.minus ? `Where ${S.letter} and ${S.minus} differ: ` : S.head === "rollout" ? "What is in " : "Where ", h("code", {}, fmt.tok(S.tokens[a.row])), S.minus || S.head === "rollout" ? " " : " looks ", h("span", {class: "num"}, `row ${fmt.int(a.row)}`)),
    h("table", {}, h("caption", {class: "sr"}, "largest attention weights of this row"), h("tbody", {},
      a.bars.map(b => h("tr", {}, h("td", {}, h("button", {type: "button", class: "quiet", title: `token ${fmt.int(b.col)}`, onclick: () => S.setPin({row: a.row, col: b.col}, true)},
        b.col === 0 ? "token 0" : fmt.tok(S.tokens[b.col]))), h("td", {}, h("i", {class: S.minus ? (b.weight < 0 ? "divless" : "divmore") : `bits ${bitClass(b.bits)}`, style: `width:${Math.abs(b.weight) / top * 100}%`})), h("td", {class: "num"}, text(b.weight)))),
      a.others > 0 ? h("tr", {}, h("td", {class: "soft"}, `${fmt.int(a.others)} others`), h("td", {}, h("i", {class: "tailbar", style: `width:${(a.tail || 0) / top * 100}%`})), h("td", {class: "num"}, fmt.dec(a.tail, 3))) : null)),
    a.lost ? h("p", {class: "soft lostline"}, h("s", {class: "bits b0"}), `${fmt.int(a.lost)} earlier tokens are evicted and get no weight.`) : null);
}
let statsAsk = 0;
async function drawHeads() {
  const mine = ++statsAsk, a = await server.stats(S.ask()).catch(() => null);
  if (mine !== statsAsk || !a || a.error) { if (a && a.error) figures.replaceChildren(); return; }
  const per = S.now.heads / S.now.kv_heads, most = Math.max(...a.mean_distance.filter(x => x !== null), 1);
  swap(figures, h("div", {class: "h"}, `Heads of layer ${S.layer}`), h("table", {}, h("thead", {}, h("tr", {}, ["head", "entropy", "sink rate", "distance"].map((n, k) =>
    h("th", {scope: "col", title: ["query head → KV head", "nats, mean over rows", "share of rows with more than 0.3 on token 0", "mean tokens between a row and what it reads"][k]}, n)))),
    h("tbody", {}, a.entropy.map((e, i) => h("tr", {class: S.head === i ? "on" : "", onclick: () => S.choose({head: i})},
      h("td", {}, h("button", {type: "button", class: "quiet num", "data-key": `head-${i}`, "aria-pressed": String(S.head === i)}, `${i} → ${Math.floor(i / per)}`)),
      h("td", {class: "num"}, fmt.dec(e, 2)), h("td", {class: "num"}, h("i", {class: "minibar", style: `width:${(a.sink_rate[i] || 0) * 28}px`}), a.sink_rate[i] === null ? "–" : a.sink_rate[i].toFixed(2)),
      h("td", {class: "num"}, fmt.int(a.mean_distance[i])))))));
}

/* cache map */
const cmap = h("canvas", {class: "cachecanvas", height: 10, width: 10, role: "img", "aria-label": "cache map: layers by tokens"});
const slider = h("input", {type: "range", "aria-label": "step: the row that was fed last", min: 0, max: 1, value: 1});
const cnote = h("span", {class: "num"}), clegend = h("span", {class: "key"}), kvpick = h("select", {"aria-label": "KV head of the cache map"});
const cerror = h("p", {class: "soft", hidden: true}), cbody = h("div", {class: "cachebody"}, h("div", {class: "cachewrap"}, cmap, h("div", {class: "cachemark"})), slider);
const cachebox = h("section", {class: "cachebox", "aria-label": "cache map"},
  h("div", {class: "row"}, h("span", {class: "h"}, "Cache map · layers × tokens"), cnote, kvpick, h("span", {class: "sp"}), clegend), cerror, cbody, lifebox);
let cacheAsk = 0, lastCache = null;
const drawCache = debounce(async () => {
  if (!S.now) return;
  const mine = ++cacheAsk, cols = [Math.floor(V.c), Math.ceil(V.c + V.span)];
  const a = await server.cache({key: S.key, letter: S.letter, row: Number(slider.value), kv: kvpick.value || "all", cols, width: 1056}).catch(() => null);
  if (mine !== cacheAsk || !a) return;
  cerror.hidden = !a.error; cbody.hidden = !!a.error; clegend.hidden = !!a.error;
  if (a.error) { cerror.textContent = a.error; cnote.textContent = ""; lifebox.replaceChildren(); return; }
  lastCache = a; a.bytes = bytes(a.data); paintCache();
  const step = a.row - S.now.prompt + 1;
  cnote.textContent = step > 0 ? `step ${fmt.int(step)} of ${fmt.int(a.rows - S.now.prompt)}` : `prompt row ${fmt.int(a.row)}`;
  const all = Object.values(a.totals).reduce((x, y) => x + y, 0) || 1;
  swap(clegend, ...["16", "8", "4", "3", "2", "0"].filter(b => a.totals[b]).map(b => h("span", {}, h("s", {class: `bits b${b}`}), b === "0" ? "evicted " : b + " bit ",
    h("b", {class: "num"}, Math.round(a.totals[b] / all * 100) + "%"))));
}, 60);
function paintCache() {
  const a = lastCache; if (!a) return;
  const cell = Math.max(3, Math.min(12, Math.round(132 / a.h))), W = Math.max(a.w, Math.min(1056, cmap.parentNode.clientWidth || 1056) | 0);
  cmap.width = W; cmap.height = a.h * cell; const g = cmap.getContext("2d");
  const colour = {16: css("--b16"), 8: css("--b8"), 4: css("--b4"), 3: css("--b3"), 2: css("--b2")}, hatch = hatchPattern ? g.createPattern(hatchPattern, "repeat") : css("--b0");
  for (let y = 0; y < a.h; y++) for (let x = 0; x < a.w; x++) { const b = a.bytes[y * a.w + x]; if (b === 255) continue;
    g.fillStyle = b === 0 ? hatch : colour[b] || "#888"; const x0 = Math.floor(x * W / a.w), x1 = Math.floor((x + 1) * W / a.w); g.fillRect(x0, y * cell, Math.max(1, x1 - x0), cell - (cell > 5 ? 1 : 0)); }
  const mark = cachebox.querySelector(".cachemark"), at = S.layer * cell;
  mark.style.top = at / cmap.height * 100 + "%"; mark.style.height = cell / cmap.height * 100 + "%";
}
slider.addEventListener("input", drawCache); kvpick.addEventListener("change", drawCache);
cmap.addEventListener("click", async e => { if (!lastCache) return; const r = cmap.getBoundingClientRect();
  const i = Math.floor(lastCache.cols[0] + (e.clientX - r.left) / r.width * (lastCache.cols[1] - lastCache.cols[0])); tellLife(Math.min(i, S.tokens.length - 1)); });
async function tellLife(i) {
  const a = await server.life({key: S.key, letter: S.letter, token: i}).catch(() => null); if (!a) return;
  const entries = S.now.layers_total * S.now.kv_heads;
  swap(lifebox, h("div", {class: "row"}, h("span", {class: "h"}, "Life of token ", h("span", {class: "num"}, fmt.int(i))), h("code", {}, fmt.tok(S.tokens[i])), h("span", {class: "soft"}, a.error ||
    a.events.map(v => `${v.what}${v.what === "narrowed" ? ` to ${v.bits} bit` : ""} at row ${fmt.int(v.row)} (${fmt.int(v.entries)} of ${fmt.int(entries)} entries)`).join(" · "))));
}
