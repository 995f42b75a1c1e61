/* Puts the pieces of the Attention tab together; runs after all of them. */
const tools = h("div", {class: "row maptools"}), caption = h("div", {class: "h mapnote"}),
  scalebox = h("div", {class: "mapscale"});
const known = () => S.now.layers.length ? S.now.layers : S.now.overview;
const captured = () => known().length === S.now.layers_total ? `all ${S.now.layers_total} layers`
  : `only the captured layers ${known().join(", ")}`;
function cellsAre(tile) { // what one cell of a tile stands for
  const what = S.minus ? `difference of the ${tile.pool}` : tile.pool;
  if (tile.group > 1) {
    const mean = `the mean of ${tile.group} columns`, one = tile.row_step === 1 && tile.col_step === tile.group;
    return one ? ` · a cell is one row, ${mean}` : ` · ${what} of ${tile.row_step} × ${tile.col_step} a cell, from ${mean}`;
  }
  if (tile.row_step > 1 || tile.col_step > 1) return ` · ${what} of ${tile.row_step} × ${tile.col_step} a cell`;
  return " · exact, one weight a cell";
}
function mapKeys(inside) {
  if (S.pin) return fingers ? " · pinned" : " · pinned, Esc releases";
  return fingers ? ` · two fingers zoom${inside ? ", one moves" : ""}, a tap pins`
    : " · wheel zooms, drag moves, click pins";
}
function shades(tile) { // the scale's ends; all weights up to a logarithmic one's floor have its first shade
  const top = fmt.dec(tile.top, 3), small = `≤ ${tile.floor < 1e-3 ? tile.floor.toExponential(0) : fmt.dec(tile.floor, 3)}`;
  const middle = tile.log ? `log, ${small} in the middle` : "linear";
  if (S.minus) return [`${S.minus} more, ${top}`, `${S.letter} more, ${top}`, middle];
  return [tile.log ? small : "0", top, tile.log ? "log" : "linear"];
}
function note() {
  if (!S.now) return; const tile = tiles.near || tiles.over, inside = V.span < total();
  const exactly = tile && tile.coarse && tiles.near && sharpening === null
    ? h("button", {type: "button", class: "quiet", onclick: () => sharpen({exact: true})}, "Compute single tokens here") : null;
  const zooming = tiles.over && tiles.over.stored;
  swap(caption, `${fmt.int(total())} × ${fmt.int(total())} tokens`,
    tile ? h("span", {class: "num"}, inside ? ` · ${fmt.int(V.span)} × ${fmt.int(V.span)} in sight` : "", cellsAre(tile),
      sharpening !== null ? ` · sharpening, ${Math.round(sharpening * 100)}%` : "",
      zooming ? " · kept with the run" : "",
      h("span", {class: "mapkeys"}, mapKeys(inside))) : "",
    exactly);
  const over = typeof S.head === "number" ? `query head ${S.head}` : `${S.head} over heads`;
  const parts = [
    zooming ? "This run keeps an overview of its attention. Single tokens need its model, which reads the text once more." : "",
    S.head === "rollout" ? `Rollout through ${captured()}: how much of each token a row is made of.` : "",
    S.over && S.head !== "rollout" ? `${S.over === "max" ? "Largest" : "Mean"} over ${captured()}, ${over}.` : "",
    S.minus && S.fork !== null && S.fork < total()
      ? `From token ${fmt.int(S.fork)} on (the red lines) the two texts differ.` : ""].filter(Boolean);
  const widths = new Set(); for (const t of [tiles.over, tiles.near]) if (t && t.width) for (const b of t.width) widths.add(b);
  const key = (b, text) => h("span", {}, h("s", {class: `bits b${b}`}), text), ends = tile ? shades(tile) : [];
  swap(scalebox, tile ? [h("span", {class: "num"}, ends[0]), h("i", {class: S.minus ? "div" : "seq"}),
    h("span", {class: "num"}, ends[1]), h("span", {}, ends[2]),
    [8, 4, 3, 2].filter(b => widths.has(b)).map(b => key(b, `read at ${b} bit`)), key(0, "evicted")] : "",
    parts.length ? h("span", {class: "said"}, parts.join(" ")) : "", zooming && tiles.over.replay ? h("button", {type: "button",
      class: "plain", "data-key": "zoomreplay", onclick: S.replay}, "Replay to zoom to single tokens") : null);
  for (const b of tools.querySelectorAll("[data-zoom]")) b.disabled = b.dataset.zoom === "in" ? V.span <= 16 : V.span >= total();
}
const seg = (name, options, current, pick) => h("span", {class: "seg", role: "group", "aria-label": name},
  options.map(([value, text, title, off]) => h("button", {type: "button", title: title || null, "data-key": `${name}-${value}`, disabled: off,
    "aria-pressed": String(value === current), onclick: () => pick(value)}, text)));
const stepper = (name, list, current, pick) => [-1, 1].map(d => {
  const to = list.indexOf(current) + d;
  return h("button", {type: "button", class: "quiet stepper", "data-key": `${name}${d}`,
    "aria-label": d < 0 ? `previous ${name}` : `next ${name}`, disabled: to < 0 || to >= list.length || !list.includes(current),
    onclick: () => pick(list[to])}, d < 0 ? "‹" : "›");
});
function layerPicker() {
  const v = S.now, every = Array.from({length: v.layers_total}, (_, i) => i), have = new Set(v.layers);
  const which = v.layers.length === v.layers_total || !v.layers.length ? "all layers" : "captured layers";
  const only = new Set(v.overview), missing = l => have.has(l) ? "" : only.has(l) ? v.layers.length ? " · overview only" : ""
    : " · not captured";
  const combined = [["mean", `${which}, mean`], ["max", `${which}, max`]], list = v.layers.length ? v.layers : every;
  const [back, on] = stepper("layer", list.includes(S.layer) ? list : every, S.layer, layer => S.choose({layer, over: null}));
  const pick = e => S.choose(/^\d+$/.test(e.target.value) ? {layer: Number(e.target.value), over: null} : {over: e.target.value});
  return h("span", {class: "stepbox"}, back, h("select", {"aria-label": "layer", "data-key": "layer", onchange: pick,
    disabled: S.head === "rollout", title: S.head === "rollout" ? "a rollout goes through every captured layer" : null},
    combined.map(([value, text]) => h("option", {value, selected: S.over === value}, text)),
    every.map(l => h("option", {value: l, selected: S.over === null && l === S.layer},
      `layer ${l}${missing(l)}`))), on);
}
function headPicker() {
  const v = S.now, per = v.heads / v.kv_heads, list = ["mean", "max", "rollout", ...Array.from({length: v.heads}, (_, i) => i)];
  const [back, on] = stepper("head", list, S.head, head => S.choose({head}));
  const name = x => typeof x === "number" ? `Q head ${x} → KV head ${Math.floor(x / per)}`
    : x === "rollout" ? "all heads and layers, rollout" : `all heads, ${x}`;
  const pick = e => S.choose({head: /^\d+$/.test(e.target.value) ? Number(e.target.value) : e.target.value});
  return h("span", {class: "stepbox"}, back, h("select", {"aria-label": "head", "data-key": "head", onchange: pick},
    list.map(x => h("option", {value: x, selected: x === S.head}, name(x)))), on);
}
function newest() { // the generated rows over the newest tokens; drag or arrow left to what they look back at
  const v = S.now; V.span = Math.max(64, (total() - v.prompt) * 2); V.r = V.c = total(); clampView(); draw(); near(); S.moved();
}
function drawTools() {
  const focus = tools.contains(document.activeElement) ? document.activeElement.dataset.key : null, v = S.now;
  const all = S.value.variants;
  const pairs = all.slice(1).map(x => [`${x.letter}-${all[0].letter}`, `${x.letter} − ${all[0].letter}`,
    `${x.title} minus ${all[0].title}: blue where ${x.letter} looks more, orange where ${all[0].letter} does`]);
  const letters = [...all.map(x => [x.letter, x.letter, x.title]), ...(S.value.absent || []).map(x => [x.letter, x.letter, x.why, true])];
  const button = (name, text, more) => h("button", {type: "button", "data-key": name, ...more}, text);
  swap(tools,
    seg("variant", [...letters.sort((x, y) => x[0] < y[0] ? -1 : 1), ...pairs], S.minus ? `${S.letter}-${S.minus}` : S.letter,
      name => S.choose({letter: name[0], minus: name[2] || null})),
    layerPicker(), headPicker(),
    seg("pooling", [["max", "max", "the largest weight under a cell"], ["mean", "mean", "the mean weight under a cell"]], S.pool,
      pool => { S.pool = pool; redraw(); }),
    seg("scale", [[true, "log"], [false, "linear"]], S.log, log => { S.log = log; redraw(); }),
    h("span", {class: "sp"}),
    button("page", "Export page", {class: "plain", title: "One HTML file of this view that opens without the lab",
      onclick: exportPage}),
    h("span", {class: "seg", role: "group", "aria-label": "zoom"},
      button("out", "−", {"data-zoom": "out", "aria-label": "zoom out", onclick: () => zoom(1.6)}),
      button("in", "+", {"data-zoom": "in", "aria-label": "zoom in", onclick: () => zoom(.6)}),
      button("newest", "Generated", {title: "zoom to the rows that were generated", onclick: newest,
        disabled: v.tokens <= v.prompt}), button("whole", "Whole run", {onclick: reset})));
  if (focus) { const node = tools.querySelector(`[data-key="${CSS.escape(focus)}"]`); if (node) node.focus(); }
}
const exporting = h("div", {class: "row exporting", role: "status", hidden: true});
let exportNumber = 0;
async function exportPage() {
  if (!exporting.hidden) return;
  const id = `${session}-page-${++exportNumber}`, ask = {...S.ask(), pool: S.pool, log: S.log, id}; let dropped = false;
  const bar = h("progress", {max: 1, value: 0, "aria-label": "making the page"}), share = h("span", {class: "num"}, "0%");
  exporting.hidden = false;
  swap(exporting, "Making the page", bar, share, h("button", {type: "button", class: "quiet", "data-key": "page-stop",
    onclick: () => { dropped = true; server.exported({...ask, drop: true}).catch(() => null); }}, "Cancel"));
  for (;;) {
    const a = await server.exported(ask).catch(() => ({error: LOST}));
    if (dropped) { server.exported({...ask, drop: true}).catch(() => null); break; }
    if (a.fraction !== undefined) {
      bar.value = a.fraction; share.textContent = `${Math.round(a.fraction * 100)}%`;
      await new Promise(done => setTimeout(done, 250)); continue;
    }
    if (a.error) toast(a.error); else { download(a); toast(`Saved ${a.name}, ${fmt.dec(a.data.length * .75 / 1048576, 1)} MB.`); }
    break;
  }
  exporting.hidden = true;
}
function redraw() { drawTools(); overview(); }
const attside = h("div", {class: "attside"}, bars, figures), pinlife = h("div", {class: "pinlife"});
const promptnote = h("span", {class: "num"});
const stage = h("div", {class: "att"},
  h("div", {class: "mapside"}, caption, mapbox, pincard, pinlife, scalebox, large),
  attside);
const tokbox = h("div", {class: "tokbox"}, h("div", {class: "h"}, "Tokens", promptnote), strip);
new ResizeObserver(() => { size(); if (S.now) { near(); paintCache(); } }).observe(stage);
const toldbox = h("div", {class: "toldbox"}); // what the address named and the run has not
function tellAddress(told) {
  const head = typeof S.head === "number" ? `query head ${S.head}` : S.head;
  const shown = `Shown: variant ${S.letter}, ${S.over ? `layers ${S.over}` : `layer ${S.layer}`}, ${head}.`;
  swap(toldbox, h("div", {class: "banner row", role: "status"},
    h("span", {}, ["The address names what is not there.", ...told, shown].join(" ")),
    h("button", {type: "button", class: "quiet", "aria-label": "close this message",
      onclick: () => toldbox.replaceChildren()}, "×")));
  S.address();
}
let loading = 0;
function outOfRange(what, asked, most) {
  toast(`${what} ${asked} does not exist: this model has ${what.toLowerCase()}s 0 to ${most}. ${what} ${most} is shown.`);
}
async function load() {
  const mine = ++loading, all = S.value.variants || [], v = all.find(x => x.letter === S.letter) || all[0];
  const other = S.minus ? all.find(x => x.letter === S.minus && x !== v) : null;
  S.minus = other ? other.letter : null; const limit = other ? Math.min(v.tokens, other.tokens) : v.tokens;
  const same = S.now && S.now.letter === v.letter && S.seen === S.key && S.limit === limit;
  const forks = other ? [v.fork, other.fork].filter(x => x !== null) : [];
  S.limit = limit; S.fork = forks.length ? Math.min(...forks) : null;
  if (S.layer >= v.layers_total) outOfRange("Layer", S.layer, v.layers_total - 1);
  if (typeof S.head === "number" && S.head >= v.heads) outOfRange("Query head", S.head, v.heads - 1);
  S.now = v; S.letter = v.letter; S.layer = Math.max(0, Math.min(v.layers_total - 1, S.layer));
  if (typeof S.head === "number") S.head = Math.max(0, Math.min(v.heads - 1, S.head));
  if (!same) {
    drawing = ++wanted; busy(true); // nothing more of what was there before
    const a = await server.tokens({key: S.key, letter: S.letter}).catch(() => ({error: LOST}));
    if (mine !== loading) return;
    if (a.error) { drawTools(); return S.trouble(a); }
    S.tokens = a.tokens.slice(0, S.limit); S.seen = S.key; stripFrom = stripTo = 0; strip.replaceChildren();
    const keep = S.pin; S.pin = S.cursor = null; tellPin();
    S.row = Math.min(keep ? keep.row : limit - 1, limit - 1); V = {r: 0, c: 0, span: limit};
    promptnote.textContent = ` · ${fmt.int(v.prompt)} prompt + ${fmt.int(v.tokens - v.prompt)} generated (read by the model)`;
    cacheReset();
    const was = kvpick.value;
    swap(kvpick, h("option", {value: "all"}, "all KV heads"), ...Array.from({length: v.kv_heads}, (_, i) =>
      h("option", {value: i, selected: String(i) === was}, `KV head ${i}`)));
  }
  dispatchEvent(new CustomEvent("al-variant", {detail: S.letter}));
  drawTools(); size(); clampView(); overview(); rowChanged(S.row, true); drawHeads(); gridShow(); tokShow(); drawCache(); note(); tellPin();
  if (S.want !== null) { const row = S.want; S.want = null; if (row < total()) S.chooseRow(row, true, tokview); }
}
function start() {
  const value = props.value || {}, compare = () => document.querySelector('[role=tab][data-tab-id="compare"]');
  if (value.replayed && S.key !== null && S.key !== value.key) return; // another run was opened while this one was replayed
  S.value = value;
  if (!value.key || !(value.variants || []).length) {
    swap(element, h("div", {class: "empty"}, h("p", {}, value.key ? `This run holds no attention. ${value.absent.map(x => `${x.letter}: ${x.why}`).join(" ")}`
      : "No run is open. Make one in Compare, or open one from Runs."),
      h("button", {type: "button", onclick: () => { const t = compare(); if (t) t.click(); }}, "Go to Compare"))); return;
  }
  if (!element.contains(stage)) swap(element, toldbox, tools, exporting, tokbox, stage, gridbox, cachebox, tokview);
  palette(); if (value.failed) S.failed.set(...value.failed);
  for (const v of value.variants) for (const layer of v.layers) S.tried.delete(`${value.key}/${v.letter}/${layer}`);
  // What an address names is shown also where the tab was looked at before the address was read.
  const s = value.sel || {}, told = value.told || [], some = Object.values(s).some(x => x !== null && x !== undefined);
  const named = (some || told.length > 0) && value.rev !== S.rev;
  const moved = S.key !== value.key || named; S.rev = value.rev;
  if (moved) {
    if (S.key !== value.key) toldbox.replaceChildren();
    S.key = value.key; S.seen = null; S.pin = null; tellPin(); const given = s.layer !== null && s.layer !== undefined;
    S.letter = s.letter || S.letter; S.minus = s.minus || null; if (s.head !== null && s.head !== undefined) S.head = s.head;
    S.over = s.layer === "mean" || s.layer === "max" ? s.layer : null; if (given && !S.over) S.layer = s.layer;
    const v = value.variants.find(x => x.letter === S.letter) || value.variants[0]; S.letter = v.letter;
    if (S.layer === null || (!v.layers.includes(S.layer) && v.layers.length && (!given || S.over)))
      S.layer = v.layers.length ? v.layers[v.layers.length >> 1] : v.layers_total >> 1;
  }
  // An address, and then the run that it named, bring the same picture twice.
  const same = JSON.stringify([value.key, value.variants]), known = same === S.got && !moved && !value.failed
    && !S.waiting;
  S.got = same; if (!known) load();
  if (named && told.length) tellAddress(told);
}
start(); watch("value", start);
