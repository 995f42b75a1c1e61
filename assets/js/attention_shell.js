/* Puts the pieces of the Attention tab together; runs after attention.js, map.js and panels.js. */
const tools = h("div", {class: "row maptools"}), caption = h("div", {class: "h mapnote"}), scalebox = h("div", {class: "mapscale"});
function note() {
  if (!S.now) return; const tile = tiles.near || tiles.over;
  swap(caption, `${fmt.int(total())} × ${fmt.int(total())} tokens`, tile ? h("span", {class: "num"}, V.span < total() ? ` · ${fmt.int(V.span)} × ${fmt.int(V.span)} in sight` : "",
    tile.row_step > 1 && S.head === "rollout" ? ` · each cell shows its last row, ${S.pool} of ${tile.col_step} columns` : tile.row_step > 1 ? ` · ${S.minus ? "difference of the " : ""}${S.pool} of ${tile.row_step} × ${tile.col_step} a cell` : " · exact, one weight a cell") : "",
    h("span", {class: "mapkeys"}, S.pin ? " · pinned, Esc releases" : " · wheel zooms, drag moves, click pins"));
  const parts = [S.head === "rollout" ? `Rollout through ${S.now.layers.length === S.now.layers_total ? "all" : "only the captured"} layers${S.now.layers.length === S.now.layers_total ? "" : " " + S.now.layers.join(", ")}: how much of each token a row is made of.` : "",
    S.minus && S.fork !== null && S.fork < total() ? `From token ${fmt.int(S.fork)} on (the red lines) the two texts differ.` : ""].filter(Boolean);
  swap(scalebox, tile ? [h("span", {class: "num"}, S.minus ? `${S.minus} more, ${fmt.dec(tile.top, 3)}` : "0"), h("i", {class: S.minus ? "div" : "seq"}),
    h("span", {class: "num"}, S.minus ? `${S.letter} more, ${fmt.dec(tile.top, 3)}` : fmt.dec(tile.top, 3)), h("span", {}, S.log ? "log" : "linear"),
    h("span", {}, h("s", {class: "bits b0"}), "evicted")] : "", parts.length ? h("span", {class: "said"}, parts.join(" ")) : "");
  for (const b of tools.querySelectorAll("[data-zoom]")) b.disabled = b.dataset.zoom === "in" ? V.span <= 16 : V.span >= total();
}
const seg = (name, options, current, pick) => h("span", {class: "seg", role: "group", "aria-label": name}, options.map(([value, text, title]) =>
  h("button", {type: "button", title: title || null, "data-key": `${name}-${value}`, "aria-pressed": String(value === current), onclick: () => pick(value)}, text)));
function drawTools() {
  const v = S.now, per = v.heads / v.kv_heads, focus = tools.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const layers = Array.from({length: v.layers_total}, (_, i) => i), have = new Set(v.layers);
  const step = (name, list, current, pick) => [-1, 1].map(d => h("button", {type: "button", class: "quiet stepper", "data-key": `${name}${d}`, "aria-label": d < 0 ? `previous ${name}` : `next ${name}`,
    disabled: list.indexOf(current) + d < 0 || list.indexOf(current) + d >= list.length, onclick: () => pick(list[list.indexOf(current) + d])}, d < 0 ? "‹" : "›"));
  const captured = v.layers.length ? v.layers : layers, heads = ["mean", "max", "rollout", ...Array.from({length: v.heads}, (_, i) => i)];
  const [l0, l1] = step("layer", captured.includes(S.layer) ? captured : layers, S.layer, layer => S.choose({layer})), [h0, h1] = step("head", heads, S.head, head => S.choose({head}));
  const all = props.value.variants, pairs = all.slice(1).map(x => [`${x.letter}-${all[0].letter}`, `${x.letter} − ${all[0].letter}`, `${x.title} minus ${all[0].title}: blue where ${x.letter} looks more, orange where ${all[0].letter} does`]);
  swap(tools, seg("variant", [...all.map(x => [x.letter, x.letter, x.title]), ...pairs], S.minus ? `${S.letter}-${S.minus}` : S.letter, name => S.choose({letter: name[0], minus: name[2] || null})),
    h("span", {class: "stepbox"}, l0, h("select", {"aria-label": "layer", "data-key": "layer", onchange: e => S.choose({layer: Number(e.target.value)})},
      layers.map(l => h("option", {value: l, selected: l === S.layer}, `layer ${l}${have.has(l) ? "" : " · not captured"}`))), l1),
    h("span", {class: "stepbox"}, h0, h("select", {"aria-label": "head", "data-key": "head", onchange: e => S.choose({head: /^\d+$/.test(e.target.value) ? Number(e.target.value) : e.target.value})},
      heads.map(x => h("option", {value: x, selected: x === S.head}, typeof x === "number" ? `Q head ${x} → KV head ${Math.floor(x / per)}` : x === "rollout" ? "all heads, rollout" : `all heads, ${x}`))), h1),
    seg("pooling", [["max", "max", "the largest weight under a cell"], ["mean", "mean", "the mean weight under a cell"]], S.pool, pool => { S.pool = pool; redraw(); }),
    seg("scale", [[true, "log"], [false, "linear"]], S.log, log => { S.log = log; redraw(); }),
    h("span", {class: "sp"}), h("button", {type: "button", class: "plain", "data-key": "page", title: "One HTML file of this view that opens without the lab", onclick: exportPage}, "Export page"),
    h("span", {class: "seg", role: "group", "aria-label": "zoom"}, h("button", {type: "button", "data-zoom": "out", "data-key": "out", "aria-label": "zoom out", onclick: () => zoom(1.6)}, "−"),
      h("button", {type: "button", "data-zoom": "in", "data-key": "in", "aria-label": "zoom in", onclick: () => zoom(.6)}, "+"), h("button", {type: "button", "data-key": "whole", onclick: reset}, "Whole run")));
  if (focus) { const node = tools.querySelector(`[data-key="${CSS.escape(focus)}"]`); if (node) node.focus(); }
}
async function exportPage(e) {
  const b = e.currentTarget; b.disabled = true; b.textContent = "Exporting…";
  const a = await server.exported({...S.ask(), pool: S.pool, log: S.log}).catch(() => ({error: "The server did not answer. Reload the page."}));
  b.disabled = false; b.textContent = "Export page"; if (a.error) { toast(a.error); return; }
  download(a); toast(`Saved ${a.name}, ${fmt.dec(a.data.length * .75 / 1048576, 1)} MB.`);
}
function redraw() { drawTools(); overview(); }
const promptnote = h("span", {class: "num"});
const stage = h("div", {class: "att"},
  h("div", {class: "mapside"}, caption, mapbox, scalebox),
  h("div", {class: "attside"}, bars, figures));
const tokbox = h("div", {class: "tokbox"}, h("div", {class: "h"}, "Tokens", promptnote), strip);
new ResizeObserver(() => { size(); if (S.now) { near(); paintCache(); } }).observe(stage);
let loading = 0;
async function load() {
  const mine = ++loading, v = (props.value.variants || []).find(x => x.letter === S.letter) || props.value.variants[0];
  const other = S.minus ? (props.value.variants || []).find(x => x.letter === S.minus && x !== v) : null;
  S.minus = other ? other.letter : null; const limit = other ? Math.min(v.tokens, other.tokens) : v.tokens;
  const same = S.now && S.now.letter === v.letter && S.seen === props.value.key && S.limit === limit;
  S.limit = limit; S.fork = other ? [v.fork, other.fork].filter(x => x !== null).reduce((a, b) => a === null ? b : Math.min(a, b), null) : null;
  if (S.layer >= v.layers_total) toast(`Layer ${S.layer} does not exist: this model has layers 0 to ${v.layers_total - 1}. Layer ${v.layers_total - 1} is shown.`);
  if (typeof S.head === "number" && S.head >= v.heads) toast(`Head ${S.head} does not exist: this model has query heads 0 to ${v.heads - 1}. Head ${v.heads - 1} is shown.`);
  S.now = v; S.letter = v.letter; S.layer = Math.max(0, Math.min(v.layers_total - 1, S.layer));
  if (typeof S.head === "number") S.head = Math.max(0, Math.min(v.heads - 1, S.head));
  if (!same) {
    const a = await server.tokens({key: S.key, letter: S.letter}).catch(() => ({error: "The server did not answer. Reload the page."}));
    if (mine !== loading) return;
    if (a.error) { drawTools(); return S.trouble(a); }
    S.tokens = a.tokens.slice(0, S.limit); S.seen = props.value.key; stripFrom = stripTo = 0; strip.replaceChildren();
    const keep = S.pin; S.pin = S.cursor = null; S.row = Math.min(keep ? keep.row : limit - 1, limit - 1); V = {r: 0, c: 0, span: limit};
    promptnote.textContent = ` · ${fmt.int(v.prompt)} prompt + ${fmt.int(v.tokens - v.prompt)} generated`;
    slider.max = v.tokens - 1; slider.value = v.tokens - 1; lifebox.replaceChildren();
    const was = kvpick.value; swap(kvpick, h("option", {value: "all"}, "all KV heads"), ...Array.from({length: v.kv_heads}, (_, i) => h("option", {value: i, selected: String(i) === was}, `KV head ${i}`)));
  }
  drawTools(); size(); clampView(); overview(); rowChanged(S.row, true); drawHeads(); gridShow(); tokShow(); drawCache(); note();
}
function start() {
  const value = props.value || {};
  if (!value.key || !(value.variants || []).length) { swap(element, h("div", {class: "empty"}, h("p", {}, "No run is open. Make one in Compare, or open one from Runs."),
    h("button", {type: "button", onclick: () => { const t = document.querySelector('[role=tab][data-tab-id="compare"]'); if (t) t.click(); }}, "Go to Compare"))); return; }
  if (!element.contains(stage)) swap(element, tools, tokbox, stage, gridbox, cachebox, tokview);
  palette(); if (value.failed) S.failed.add(value.failed);
  if (S.key !== value.key) { S.key = value.key; S.seen = null; const s = value.sel || {}; S.letter = s.letter || S.letter; if (s.layer !== null && s.layer !== undefined) S.layer = s.layer;
    if (s.head !== null && s.head !== undefined) S.head = s.head; S.minus = s.minus || null; S.pin = null;
    const v = value.variants.find(x => x.letter === S.letter) || value.variants[0]; S.letter = v.letter; if (S.layer === null || (!v.layers.includes(S.layer) && v.layers.length && (s.layer === null || s.layer === undefined)))
      S.layer = v.layers.length ? v.layers[v.layers.length >> 1] : v.layers_total >> 1; }
  load();
}
start(); watch("value", start);
