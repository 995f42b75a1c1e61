/* Thumbnails of every head of every captured layer. Needs `S` from attention.js and `ramp` from map.js. */
const MEASURES = [["layer", "layer order", ""], ["entropy", "entropy", "nats, mean over rows"], ["sink_rate", "sink rate", "share of rows with more than 0.3 on token 0"],
  ["mean_distance", "distance", "mean tokens between a row and what it reads"], ["induction", "induction", "weight on what followed the same token before"],
  ["previous", "previous token", "weight on the token just before"], ["far_mass", "far mass", "weight on neither the first 4 nor the newest 64 tokens"]];
const G = {shown: null, data: null, by: "layer", high: true, least: "", table: false, thumbs: []};
const gridtools = h("div", {class: "row"}), gridbody = h("div"), gridnote = h("p", {class: "soft note"});
const gridbox = h("section", {class: "gridbox", "aria-label": "all heads"}, gridtools, gridnote, gridbody);
const gridKey = () => `${S.key}/${S.letter}/${(S.now || {layers: []}).layers.join()}`;

async function gridFollow(start) {
  const mine = gridKey(), quiet = ms => new Promise(done => setTimeout(done, ms));
  for (let first = start; mine === gridKey(); first = false) {
    const a = await server.heads({key: S.key, letter: S.letter, start: first}).catch(() => ({error: "The server did not answer. Reload the page."}));
    if (mine !== gridKey()) return;
    G.replay = a.replay;
    if (a.fraction !== undefined) { gridWait(a.fraction); await quiet(350); continue; }
    G.data = a.heads ? a : null;
    if (G.data) gridPaint(bytes(a.thumbs));
    gridDraw(a.error); return;
  }
}
function gridShow() { if (G.shown === gridKey()) return gridMark(); G.shown = gridKey(); G.data = null; G.thumbs = []; gridDraw(); gridFollow(false); }
function gridWait(fraction) {
  swap(gridtools, h("span", {class: "h"}, "All heads"), h("progress", {value: fraction, max: 1, "aria-label": "drawing the heads"}), h("span", {class: "num"}, `${Math.round(fraction * 100)}%`),
    h("button", {type: "button", class: "quiet", onclick: () => { server.heads({key: S.key, letter: S.letter, drop: true}).catch(() => null); }}, "Cancel"));
  gridnote.textContent = "Reading every head of every captured layer."; gridbody.replaceChildren();
}
function gridPaint(all) {
  const side = G.data.side, n = side * side, bg = hex(css("--ramp0"));
  G.raw = all; G.thumbs = G.data.heads.map((_, k) => {
    const image = new ImageData(side, side);
    for (let i = 0; i < n; i++) { const b = all[k * n + i], o = i * 4; for (let c = 0; c < 3; c++) image.data[o + c] = b ? ramp[b * 3 + c] : bg[c]; image.data[o + 3] = 255; }
    return image; });
}
const gridRecolour = () => { if (G.data) { gridPaint(G.raw); gridDraw(); } };
const headName = r => `layer ${r.layer}, Q head ${r.head} → KV head ${r.kv}`;
const measured = (r, name) => name === "mean_distance" ? fmt.int(r[name]) : fmt.dec(r[name], 2);
function thumb(k, order) {
  const r = G.data.heads[k], c = h("canvas", {width: G.data.side, height: G.data.side, "aria-hidden": "true"}); c.getContext("2d").putImageData(G.thumbs[k], 0, 0);
  const words = `${headName(r)}\n${MEASURES.slice(1).map(m => `${m[1]} ${measured(r, m[0])}`).join("\n")}`;
  return h("button", {type: "button", class: "thumb", title: words, "aria-label": words.replace(/\n/g, ", "), "data-k": k, "data-o": order, tabindex: order === 0 ? "0" : "-1",
    onclick: () => { S.choose({layer: r.layer, head: r.head}); canvas.scrollIntoView({block: "nearest"}); }}, c);
}
function gridMark() {
  for (const b of gridbody.querySelectorAll("[data-k]")) { const r = G.data.heads[b.dataset.k], on = r.layer === S.layer && r.head === S.head;
    b.classList.toggle("on", on); b.setAttribute("aria-current", String(on)); }
}
function gridChosen() {
  const list = G.data.heads.map((r, k) => k), value = k => G.data.heads[k][G.by], least = parseFloat(G.least);
  if (G.by === "layer") return list;
  return list.filter(k => value(k) !== null && (isNaN(least) || value(k) >= least)).sort((a, b) => (G.high ? -1 : 1) * (value(a) - value(b)) || a - b);
}
function gridDraw(problem) {
  if (!S.now) return;
  const missing = S.now.layers_total - S.now.layers.length, replay = missing && G.replay ? h("button", {type: "button", class: "quiet", onclick: () => trigger("replay", S.ask())}, "Replay to capture them") : null;
  if (!G.data) {
    swap(gridtools, h("span", {class: "h"}, "All heads"), S.now.layers.length ? h("button", {type: "button", class: "plain", "data-key": "grid", onclick: () => gridFollow(true)}, `Draw ${fmt.int(S.now.layers.length * S.now.heads)} heads`) : null);
    swap(gridnote, problem || (S.now.layers.length ? missing ? `${fmt.int(missing)} of ${fmt.int(S.now.layers_total)} layers are not captured. ` : "" : "This variant holds no captured attention. Load the run's model and replay it."), problem ? null : replay);
    gridbody.replaceChildren(); return;
  }
  const chosen = gridChosen(), m = MEASURES.find(x => x[0] === G.by), focus = gridtools.contains(document.activeElement) ? document.activeElement.dataset.key : null, redrawn = () => gridDraw();
  swap(gridtools, h("span", {class: "h"}, "All heads"), h("select", {"aria-label": "sort heads by", "data-key": "by", onchange: e => { G.by = e.target.value; G.least = ""; redrawn(); }}, MEASURES.map(x => h("option", {value: x[0], selected: x[0] === G.by}, x[0] === "layer" ? x[1] : `by ${x[1]}`))),
    G.by === "layer" ? null : [h("button", {type: "button", class: "quiet", "data-key": "dir", onclick: () => { G.high = !G.high; redrawn(); }}, G.high ? "highest first" : "lowest first"),
      h("label", {class: "soft"}, "at least ", h("input", {type: "number", step: "any", class: "least", "data-key": "least", "aria-label": `least ${m[1]}`, value: G.least, onchange: e => { G.least = e.target.value; redrawn(); }}))],
    h("span", {class: "num soft"}, `${fmt.int(chosen.length)} of ${fmt.int(G.data.heads.length)}`), h("span", {class: "sp"}),
    h("span", {class: "seg small", role: "group", "aria-label": "heads as"}, [[false, "maps"], [true, "table"]].map(([v, t]) => h("button", {type: "button", "data-key": `as-${v}`, "aria-pressed": String(G.table === v), onclick: () => { G.table = v; redrawn(); }}, t))));
  swap(gridnote, [m[2] ? `${m[1]}: ${m[2]}. ` : "", `A pixel is the largest weight of ${G.data.step} × ${G.data.step} tokens, square-root scale, each head to its own maximum`, G.data.sampled ? ", last 8 rows of each cell read" : "",
    G.data.tokens > 512 ? "; measures are means over about 512 sampled rows. " : ". ", missing ? `Captured layers only: ${G.data.layers.join(", ")} of ${fmt.int(S.now.layers_total)}. ` : ""].join(""), replay);
  if (G.table) swap(gridbody, h("div", {class: "tablebox tall"}, h("table", {class: "lines"}, h("caption", {class: "sr"}, "measures of every head"), h("thead", {}, h("tr", {}, ["head", ...MEASURES.slice(1).map(x => x[1])].map(t => h("th", {scope: "col"}, t)))),
    h("tbody", {}, chosen.map(k => { const r = G.data.heads[k]; return h("tr", {}, h("th", {scope: "row"}, h("button", {type: "button", class: "link", "data-k": k, onclick: () => S.choose({layer: r.layer, head: r.head})}, headName(r))),
      MEASURES.slice(1).map(x => h("td", {class: "num"}, measured(r, x[0])))); })))));
  else if (G.by === "layer") { const per = S.now.heads / S.now.kv_heads; let o = 0;
    swap(gridbody, h("div", {class: "gridrows"}, G.data.layers.map(layer => h("div", {class: "gridrow"}, h("span", {class: "num soft"}, layer),
      Array.from({length: S.now.kv_heads}, (_, kv) => h("span", {class: "kvgroup", title: `layer ${layer}, KV head ${kv}`}, chosen.filter(k => G.data.heads[k].layer === layer && Math.floor(G.data.heads[k].head / per) === kv).map(k => thumb(k, o++)))))))); }
  else swap(gridbody, chosen.length ? h("div", {class: "gridsorted"}, chosen.map((k, o) => h("span", {class: "sortedhead"}, thumb(k, o), h("small", {class: "num"}, `${G.data.heads[k].layer}·${G.data.heads[k].head}`), h("small", {class: "num soft"}, measured(G.data.heads[k], G.by))))) : h("p", {class: "soft"}, "No head reaches this value."));
  gridMark(); if (focus) { const node = gridtools.querySelector(`[data-key="${focus}"]`); if (node) node.focus(); }
}
gridbody.addEventListener("keydown", e => { const t = e.target.closest(".thumb"); if (!t) return;
  const all = [...gridbody.querySelectorAll(".thumb")], i = all.indexOf(t), per = G.by === "layer" ? S.now.heads : 10;
  const to = {ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + per, ArrowUp: i - per, Home: 0, End: all.length - 1}[e.key];
  if (to === undefined || !all[to]) return; e.preventDefault(); t.tabIndex = -1; all[to].tabIndex = 0; all[to].focus(); });
