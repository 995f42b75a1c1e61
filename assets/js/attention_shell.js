/* Puts the pieces of the Attention tab together; runs after attention.js, map.js and panels.js. */
const tools = h("div", {class: "row maptools"}), caption = h("div", {class: "h mapnote"});
function note() {
  if (!S.now) return; const tile = tiles.near || tiles.over;
  swap(caption, `${fmt.int(total())} × ${fmt.int(total())} tokens`, tile ? h("span", {class: "num"}, V.span < total() ? ` · ${fmt.int(V.span)} × ${fmt.int(V.span)} in sight` : "",
    tile.row_step > 1 ? ` · ${S.pool} of ${tile.row_step} × ${tile.col_step} a cell` : " · exact, one weight a cell") : "",
    h("span", {class: "mapkeys"}, S.pin ? " · pinned, Esc releases" : " · wheel zooms, drag moves, click pins"));
  for (const b of tools.querySelectorAll("[data-zoom]")) b.disabled = b.dataset.zoom === "in" ? V.span <= 16 : V.span >= total();
}
const seg = (name, options, current, pick) => h("span", {class: "seg", role: "group", "aria-label": name}, options.map(([value, text, title]) =>
  h("button", {type: "button", title: title || null, "data-key": `${name}-${value}`, "aria-pressed": String(value === current), onclick: () => pick(value)}, text)));
function drawTools() {
  const v = S.now, per = v.heads / v.kv_heads, focus = tools.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const layers = Array.from({length: v.layers_total}, (_, i) => i), have = new Set(v.layers);
  const step = (name, list, current, pick) => [-1, 1].map(d => h("button", {type: "button", class: "quiet stepper", "data-key": `${name}${d}`, "aria-label": d < 0 ? `previous ${name}` : `next ${name}`,
    disabled: list.indexOf(current) + d < 0 || list.indexOf(current) + d >= list.length, onclick: () => pick(list[list.indexOf(current) + d])}, d < 0 ? "‹" : "›"));
  const captured = v.layers.length ? v.layers : layers, heads = ["mean", "max", ...Array.from({length: v.heads}, (_, i) => i)];
  const [l0, l1] = step("layer", captured.includes(S.layer) ? captured : layers, S.layer, layer => S.choose({layer})), [h0, h1] = step("head", heads, S.head, head => S.choose({head}));
  swap(tools, seg("variant", props.value.variants.map(x => [x.letter, x.letter, x.title]), S.letter, letter => S.choose({letter})),
    h("span", {class: "stepbox"}, l0, h("select", {"aria-label": "layer", "data-key": "layer", onchange: e => S.choose({layer: Number(e.target.value)})},
      layers.map(l => h("option", {value: l, selected: l === S.layer}, `layer ${l}${have.has(l) ? "" : " · not captured"}`))), l1),
    h("span", {class: "stepbox"}, h0, h("select", {"aria-label": "head", "data-key": "head", onchange: e => S.choose({head: /^\d+$/.test(e.target.value) ? Number(e.target.value) : e.target.value})},
      heads.map(x => h("option", {value: x, selected: x === S.head}, typeof x === "number" ? `Q head ${x} → KV head ${Math.floor(x / per)}` : `all heads, ${x}`))), h1),
    seg("pooling", [["max", "max", "the largest weight under a cell"], ["mean", "mean", "the mean weight under a cell"]], S.pool, pool => { S.pool = pool; redraw(); }),
    seg("scale", [[true, "log"], [false, "linear"]], S.log, log => { S.log = log; redraw(); }),
    h("span", {class: "sp"}), h("span", {class: "seg", role: "group", "aria-label": "zoom"}, h("button", {type: "button", "data-zoom": "out", "data-key": "out", "aria-label": "zoom out", onclick: () => zoom(1.6)}, "−"),
      h("button", {type: "button", "data-zoom": "in", "data-key": "in", "aria-label": "zoom in", onclick: () => zoom(.6)}, "+"), h("button", {type: "button", "data-key": "whole", onclick: reset}, "Whole run")));
  if (focus) { const node = tools.querySelector(`[data-key="${CSS.escape(focus)}"]`); if (node) node.focus(); }
}
function redraw() { drawTools(); overview(); }
const promptnote = h("span", {class: "num"});
const stage = h("div", {class: "att"},
  h("div", {class: "mapside"}, caption, mapbox),
  h("div", {class: "attside"}, bars, figures));
const tokbox = h("div", {class: "tokbox"}, h("div", {class: "h"}, "Tokens", promptnote), strip);
new ResizeObserver(() => { size(); if (S.now) { near(); paintCache(); } }).observe(stage);
let loading = 0;
async function load() {
  const mine = ++loading, v = (props.value.variants || []).find(x => x.letter === S.letter) || props.value.variants[0];
  const same = S.now && S.now.letter === v.letter && S.seen === props.value.key;
  S.now = v; S.letter = v.letter; S.layer = Math.max(0, Math.min(v.layers_total - 1, S.layer));
  if (typeof S.head === "number") S.head = Math.max(0, Math.min(v.heads - 1, S.head));
  if (!same) {
    const a = await server.tokens({key: S.key, letter: S.letter}).catch(() => ({error: "The server did not answer. Reload the page."}));
    if (mine !== loading) return;
    if (a.error) { drawTools(); return S.trouble(a); }
    S.tokens = a.tokens; S.seen = props.value.key; stripFrom = stripTo = 0; strip.replaceChildren();
    const keep = S.pin; S.pin = S.cursor = null; S.row = Math.min(keep ? keep.row : v.tokens - 1, v.tokens - 1); V = {r: 0, c: 0, span: v.tokens};
    promptnote.textContent = ` · ${fmt.int(v.prompt)} prompt + ${fmt.int(v.tokens - v.prompt)} generated`;
    slider.max = v.tokens - 1; slider.value = v.tokens - 1; lifebox.replaceChildren();
    const was = kvpick.value; swap(kvpick, h("option", {value: "all"}, "all KV heads"), ...Array.from({length: v.kv_heads}, (_, i) => h("option", {value: i, selected: String(i) === was}, `KV head ${i}`)));
  }
  drawTools(); size(); clampView(); overview(); rowChanged(S.row, true); drawHeads(); drawCache(); note();
}
function start() {
  const value = props.value || {};
  if (!value.key || !(value.variants || []).length) { swap(element, h("div", {class: "empty"}, h("p", {}, "No run is open. Make one in Compare, or open one from Runs."),
    h("button", {type: "button", onclick: () => { const t = document.querySelector('[role=tab][data-tab-id="compare"]'); if (t) t.click(); }}, "Go to Compare"))); return; }
  if (!element.contains(stage)) swap(element, tools, tokbox, stage, cachebox);
  palette(); if (value.failed) S.failed.add(value.failed);
  if (S.key !== value.key) { S.key = value.key; S.seen = null; const s = value.sel || {}; S.letter = s.letter || S.letter; if (s.layer !== null && s.layer !== undefined) S.layer = s.layer;
    if (s.head !== null && s.head !== undefined) S.head = s.head; S.pin = null;
    const v = value.variants.find(x => x.letter === S.letter) || value.variants[0]; S.letter = v.letter; if (S.layer === null || (!v.layers.includes(S.layer) && v.layers.length && (s.layer === null || s.layer === undefined)))
      S.layer = v.layers.length ? v.layers[v.layers.length >> 1] : v.layers_total >> 1; }
  load();
}
start(); watch("value", start);
