/* Token view: the generated texts side by side, coloured by one measure. Needs `S` from attention.js and `maptip` from map.js. */
const T = {key: null, data: null, by: null, extra: null, table: false};
const toktools = h("div", {class: "row"}), toknote = h("p", {class: "soft note"}), tokcols = h("div", {class: "tokcols"});
const tokview = h("section", {class: "gridbox tokview", "aria-label": "generated text by token"}, toktools, toknote, tokcols);
const NEEDS_CAPTURE = ["prompt_mass", "lookback"];

async function tokShow() {
  if (T.key === S.key) return; T.key = S.key; T.data = null; T.extra = null;
  const mine = S.key, a = await server.texts({key: S.key}).catch(() => ({error: LOST}));
  if (mine !== T.key) return;
  if (a.error || !a.cols.length) { swap(toktools, h("span", {class: "h"}, "Generated text"));
    toknote.textContent = a.error || "No variant of this run wrote a token."; tokcols.replaceChildren(); return; }
  T.data = a; const has = name => a.cols.some(c => c.values[name]);
  if (!T.by || !(has(T.by) || NEEDS_CAPTURE.includes(T.by))) T.by = has("kl") ? "kl" : has("surprisal") ? "surprisal" : "entropy";
  tokDraw(); if (NEEDS_CAPTURE.includes(T.by)) tokFollow();
}
async function tokFollow() {
  const mine = T.key;
  while (mine === T.key) {
    const a = await server.attended({key: S.key}).catch(() => ({error: LOST}));
    if (mine !== T.key) return;
    if (a.fraction !== undefined) { toknote.textContent = `Reading the captured layers · ${Math.round(a.fraction * 100)}%`;
      await new Promise(d => setTimeout(d, 350)); continue; }
    if (a.error) { toknote.textContent = a.error; return; }
    T.extra = a; tokDraw(); return;
  }
}
const tokValues = c => NEEDS_CAPTURE.includes(T.by) ? ((T.extra || {values: {}}).values[c.letter] || {})[T.by] : c.values[T.by];
const tokMeasure = () => T.data.measures.find(m => m.name === T.by);
function tokPick(name) { T.by = name; tokDraw(); if (NEEDS_CAPTURE.includes(name) && !T.extra) tokFollow(); }
function tokDraw() {
  const m = tokMeasure(), captured = T.data.cols.some(c => c.layers.length),
    focus = toktools.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  swap(toktools, h("span", {class: "h"}, "Generated text"), h("select", {"aria-label": "colour the text by", "data-key": "by",
    onchange: e => tokPick(e.target.value)}, T.data.measures.map(x =>
    h("option", {value: x.name, selected: x.name === T.by, disabled: NEEDS_CAPTURE.includes(x.name) ? !captured
      : !T.data.cols.some(c => c.values[x.name])}, `by ${x.title}`))),
    h("span", {class: "mapscale"}, h("span", {class: "num"}, fmt.dec(m.low, 0)), h("i", {class: "tok"}),
      h("span", {class: "num"}, `${fmt.dec(m.high, 0)}${m.high > 1 || m.name === "kl" ? " and more" : ""}, square-root scale`)),
      h("span", {class: "sp"}),
    h("span", {class: "seg small", role: "group", "aria-label": "text as"},
      [[false, "text"], [true, "table"]].map(([v, t]) => h("button", {type: "button", "data-key": `as-${v}`,
      "aria-pressed": String(T.table === v), onclick: () => { T.table = v; tokDraw(); }}, t))));
  const read = NEEDS_CAPTURE.includes(T.by) && T.extra ? [...new Set(Object.values(T.extra.layers).flat())].sort((a, b) => a - b)
    : null;
  toknote.textContent = `${m.title}: ${m.help}.` + (read && S.now && read.length < S.now.layers_total
    ? ` Captured layers only: ${read.join(", ")}.` : "") + (["kl", "agree"].includes(T.by)
    ? " Uncoloured after the first divergence, where the texts no longer share what came before." : "");
  swap(tokcols, T.data.cols.map((c, n) => tokColumn(c, n)));
  if (focus) { const node = toktools.querySelector(`[data-key="${focus}"]`); if (node) node.focus(); }
}
function tokColumn(c, n) {
  const values = tokValues(c), m = tokMeasure(), share = v => v === null || v === undefined ? 0
    : Math.max(0, Math.min(1, (v - m.low) / (m.high - m.low)));
  const name = h("div", {class: `row v${c.letter}`}, h("span", {class: "badge"}, c.letter), h("b", {}, c.title));
  if (!values) return h("article", {class: `v${c.letter}`}, name, h("p", {class: "soft note"},
    NEEDS_CAPTURE.includes(T.by) ? c.layers.length ? "…" : "No captured attention for this variant. Replay it from the map."
    : n === 0 ? "This is the reference: nothing to compare it with." : "Not recorded for this variant."));
  if (T.table) return h("article", {class: `v${c.letter}`}, name, h("div", {class: "tablebox tall"},
    h("table", {class: "lines"}, h("thead", {}, h("tr", {}, ["token", m.title].map(t => h("th", {scope: "col"}, t)))),
    h("tbody", {}, c.text.map((t, i) => h("tr", {}, h("th", {scope: "row"}, h("code", {}, fmt.tok(t))),
      h("td", {class: "num"}, fmt.dec(values[i], 3))))))));
  return h("article", {class: `v${c.letter}`}, name, h("div", {class: "toktext", role: "group",
    "aria-label": `text of ${c.letter}, arrow keys move`, "data-n": n}, c.text.map((t, i) =>
    h("span", {class: "tv" + (i === c.fork ? " fork" : ""), "data-i": i, tabindex: i === 0 ? "0" : "-1",
      style: `--w:${Math.sqrt(share(values[i])).toFixed(3)}`}, t.replace(/\n/g, "⏎\n")))));
}
function tokTip(span) {
  const c = T.data.cols[span.parentNode.dataset.n], i = Number(span.dataset.i), v = (tokValues(c) || [])[i], m = tokMeasure(),
    list = (title, rows) => !rows || !rows.length ? null : h("div", {class: "tipalt"}, h("small", {}, title),
    rows.map(([text, p]) => h("div", {}, h("code", {}, text), h("i", {style: `width:${Math.max(1, parseFloat(p) * 90)}px`}),
      h("span", {class: "num"}, p))));
  swap(maptip, h("div", {class: "tiphead"}, h("code", {}, fmt.tok(c.text[i])),
    h("span", {class: "soft"}, `token ${i + 1} of ${c.letter}`)), h("div", {class: "tipline"}, h("span", {}, m.title),
    h("b", {class: "num"}, fmt.dec(v, 3))),
    list(`${c.letter}'s choices here`, c.own[i]), list(`${T.data.cols[0].letter}'s choices here`, c.other[i]),
      i > (c.fork ?? Infinity) ? h("small", {class: "soft"},
      "after the first divergence: the other text reads something else here") : null);
  maptip.hidden = false; const r = span.getBoundingClientRect();
  maptip.style.left = Math.max(8, Math.min(innerWidth - maptip.offsetWidth - 8, r.left)) + "px";
  maptip.style.top = (r.bottom + maptip.offsetHeight + 12 < innerHeight ? r.bottom + 8
    : Math.max(8, r.top - maptip.offsetHeight - 8)) + "px"; live.textContent = maptip.textContent;
}
const tokOf = e => e.target.closest && e.target.closest(".tv");
tokcols.addEventListener("mouseover", e => { const t = tokOf(e); if (t) tokTip(t); else maptip.hidden = true; });
tokcols.addEventListener("mouseleave", () => { maptip.hidden = true; });
tokcols.addEventListener("focusin", e => { const t = tokOf(e); if (t) tokTip(t); });
tokcols.addEventListener("focusout", () => { maptip.hidden = true; });
function tokChoose(t) { // the map turns to this token's row, in its own variant, and its life is told
  const c = T.data.cols[t.parentNode.dataset.n], row = S.now.prompt + Number(t.dataset.i);
  if (c.letter !== S.letter || S.minus) { S.want = row; S.choose({letter: c.letter, minus: null}); }
  else if (row < total()) S.chooseRow(row, true, tokview);
}
tokcols.addEventListener("click", e => { const t = tokOf(e); if (t && S.now) tokChoose(t); });
tokcols.addEventListener("keydown", e => { const t = tokOf(e); if (!t) return; const all = [...t.parentNode.children],
  i = all.indexOf(t);
  if (e.key === "Escape") { maptip.hidden = true; return; }
  if (e.key === "Enter" || e.key === " ") { e.preventDefault(); if (S.now) tokChoose(t); return; }
  const to = {ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: all.length - 1}[e.key];
  if (to === undefined || !all[to]) return; e.preventDefault(); t.tabIndex = -1; all[to].tabIndex = 0; all[to].focus(); });
