/* Thumbnails of every head of every captured layer. Needs `S` from attention.js and `ramp` from map.js. */
const MEASURES = [["layer", "layer order", ""], ["entropy", "entropy", "nats, mean over rows"],
  ["sink_rate", "sink rate", "share of rows with more than 0.3 on token 0"],
  ["mean_distance", "distance", "mean tokens between a row and what it reads"],
  ["induction", "induction", "weight on what followed the same token before"],
  ["previous", "previous token", "weight on the token just before"],
  ["far_mass", "far mass", "weight on neither the first 4 nor the newest 64 tokens"],
  ["importance", "importance", "gradient of the loss by a gate on the head, on the last 128 tokens, each layer to norm 1"]];
const G = {shown: null, data: null, by: "layer", high: true, least: "", most: "", table: false, thumbs: [], replay: false};
const gridtools = h("div", {class: "row"}), gridbody = h("div"), gridnote = h("p", {class: "soft note"});
const gridbox = h("section", {class: "gridbox", "aria-label": "all heads"}, gridtools, gridnote, gridbody);
const gridKey = () => `${S.key}/${S.letter}/${(S.now || {layers: []}).layers.join()}`;

async function gridFollow(start) {
  const mine = gridKey(), quiet = ms => new Promise(done => setTimeout(done, ms));
  for (let first = start; mine === gridKey(); first = false) {
    const a = await server.heads({key: S.key, letter: S.letter, start: first}).catch(() => ({error: LOST}));
    if (mine !== gridKey()) return;
    G.replay = a.replay;
    if (a.fraction !== undefined) { gridWait(a.fraction); await quiet(350); continue; }
    if (!a.error) G.data = a.heads ? a : null;
    if (G.data) gridPaint(bytes(G.data.thumbs));
    gridDraw(a.error); return;
  }
}
function gridShow() {
  if (G.shown === gridKey()) return gridMark();
  G.shown = gridKey(); G.data = null; G.thumbs = []; gridDraw(); gridFollow(false);
}
function gridWait(fraction) {
  swap(gridtools, h("span", {class: "h"}, "All heads"), h("progress", {value: fraction, max: 1,
    "aria-label": "drawing the heads"}),
    h("span", {class: "num"}, `${Math.round(fraction * 100)}%`), h("button", {type: "button", class: "quiet",
      onclick: () => { server.heads({key: S.key, letter: S.letter, drop: true}).catch(() => null); }}, "Cancel"));
  gridnote.textContent = "Reading every head of every captured layer."; gridbody.replaceChildren();
}
function gridPaint(all) {
  const side = G.data.side, n = side * side, bg = hex(css("--ramp0"));
  G.raw = all; G.thumbs = G.data.heads.map((_, k) => {
    const image = new ImageData(side, side);
    for (let i = 0; i < n; i++) {
      const b = all[k * n + i], o = i * 4;
      for (let c = 0; c < 3; c++) image.data[o + c] = b ? ramp[b * 3 + c] : bg[c];
      image.data[o + 3] = 255;
    }
    return image;
  });
}
const gridRecolour = () => { if (G.data) { gridPaint(G.raw); gridDraw(); } };
const headName = r => `layer ${r.layer}, Q head ${r.head} → KV head ${r.kv}`;
const measured = (r, name) => r[name] === null || r[name] === undefined ? "–"
  : name === "mean_distance" ? fmt.int(r[name]) : fmt.dec(r[name], 2);
const openHead = r => S.choose({layer: r.layer, head: r.head, over: null});
function thumb(k, order) {
  const r = G.data.heads[k], c = h("canvas", {width: G.data.side, height: G.data.side, "aria-hidden": "true"});
  c.getContext("2d").putImageData(G.thumbs[k], 0, 0);
  const words = `${headName(r)}\n${MEASURES.slice(1).map(m => `${m[1]} ${measured(r, m[0])}`).join("\n")}`;
  return h("button", {type: "button", class: "thumb", title: words, "aria-label": words.replace(/\n/g, ", "), "data-k": k,
    "data-o": order, tabindex: order === 0 ? "0" : "-1",
    onclick: () => { openHead(r); canvas.scrollIntoView({block: "nearest"}); }}, c);
}
function gridMark() {
  for (const b of gridbody.querySelectorAll("[data-k]")) {
    const r = G.data.heads[b.dataset.k], on = r.layer === S.layer && r.head === S.head && !S.over;
    b.classList.toggle("on", on); b.setAttribute("aria-current", String(on));
  }
}
function gridChosen() {
  const list = G.data.heads.map((r, k) => k), value = k => G.data.heads[k][G.by];
  if (G.by === "layer") return list;
  const least = parseFloat(G.least), most = parseFloat(G.most);
  return list.filter(k => value(k) !== null && (isNaN(least) || value(k) >= least) && (isNaN(most) || value(k) <= most))
    .sort((a, b) => (G.high ? -1 : 1) * (value(a) - value(b)) || a - b);
}
function gridEmpty(problem, missing, replay) {
  const heads = S.now.layers.length * S.now.heads;
  swap(gridtools, h("span", {class: "h"}, "All heads"), heads ? h("button", {type: "button", class: "plain", "data-key": "grid",
    onclick: () => gridFollow(true)}, `Draw ${fmt.int(heads)} heads`) : null);
  const none = "This variant holds no captured attention. Load the run's model and replay it.";
  swap(gridnote, !S.replaying() && problem || (heads ? missing ? `${fmt.int(missing)} of ${fmt.int(S.now.layers_total)} layers are not captured. `
    : "" : S.replaying() ? null : none),
    S.replaying() ? S.waits() : problem ? null : replay);
  gridbody.replaceChildren();
}
function gridDraw(problem) {
  if (!S.now) return;
  const missing = S.now.layers_total - (G.data ? G.data.layers.length : S.now.layers.length);
  const replay = missing && G.replay && !S.replaying() && S.now.layers.length < S.now.layers_total
    ? h("button", {type: "button", class: "quiet", onclick: S.replay}, "Replay to capture them") : null;
  if (!G.data) return gridEmpty(problem, missing, replay);
  const chosen = gridChosen(), m = MEASURES.find(x => x[0] === G.by), redrawn = () => gridDraw();
  const focus = gridtools.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const bound = (name, text) => h("label", {class: "soft"}, `${text} `, h("input", {type: "text", inputmode: "decimal",
    class: "least",
    value: G[name], "data-key": name, "aria-label": `${text === "from" ? "least" : "most"} ${m[1]}`,
    onchange: e => { G[name] = e.target.value; redrawn(); }}));
  const pair = (label, options, now, pick) => h("span", {class: "seg small", role: "group", "aria-label": label},
    options.map(([v, t]) =>
    h("button", {type: "button", "data-key": `${label === "heads as" ? "as" : "dir"}-${v}`, "aria-pressed": String(now === v),
      onclick: () => { pick(v); redrawn(); }}, t)));
  swap(gridtools, h("span", {class: "h"}, "All heads"),
    h("select", {"aria-label": "sort heads by", "data-key": "by", onchange: e => { G.by = e.target.value; G.least = G.most = "";
      redrawn(); }},
      MEASURES.map(x => h("option", {value: x[0], selected: x[0] === G.by}, x[0] === "layer" ? x[1] : `by ${x[1]}`))),
    G.by === "layer" ? null : [pair("order", [[true, "high first"], [false, "low first"]], G.high, v => { G.high = v; }),
      bound("least", "from"), bound("most", "to"), h("span", {class: "num soft"},
        `${fmt.int(chosen.length)} of ${fmt.int(G.data.heads.length)}`)],
    G.data.better ? h("button", {type: "button", class: "plain", "data-key": "grid", onclick: () => gridFollow(true)},
      "Draw again with what is known now") : null,
    h("span", {class: "sp"}), pair("heads as", [[false, "pictures"], [true, "table"]], G.table, v => { G.table = v; }));
  swap(gridnote, gridWords(m, missing), problem || (S.replaying() ? S.waits() : null), replay);
  if (G.table) swap(gridbody, gridTable(chosen));
  else if (G.by === "layer") swap(gridbody, gridLayers(chosen));
  else swap(gridbody, chosen.length ? h("div", {class: "gridsorted"}, chosen.map((k, o) => h("span", {class: "sortedhead"},
    thumb(k, o),
    h("small", {class: "num"}, `${G.data.heads[k].layer}·${G.data.heads[k].head}`),
    h("small", {class: "num soft"}, measured(G.data.heads[k], G.by))))) : h("p", {class: "soft"}, "No head reaches this value."));
  gridMark(); if (focus) { const node = gridtools.querySelector(`[data-key="${focus}"]`); if (node) node.focus(); }
}
function gridWords(m, missing) {
  const d = G.data, scale = "square-root scale, each head to its own maximum";
  const pixel = `A pixel is the largest weight of ${d.step} × ${d.step} tokens, ${scale}`;
  return [m[2] ? `${m[1]}: ${m[2]}. ` : "", pixel, d.sampled ? ", last 8 rows of each cell read" : "",
    d.tokens > 512 ? "; measures are means over about 512 sampled rows. " : ". ",
    d.importance ? "" : "Importance is measured once the run's model is loaded. ",
    missing ? `Captured layers only: ${d.layers.join(", ")} of ${fmt.int(S.now.layers_total)}. ` : ""].join("");
}
function gridTable(chosen) {
  const row = k => { const r = G.data.heads[k];
    return h("tr", {}, h("th", {scope: "row"}, h("button", {type: "button", class: "link", "data-k": k,
      onclick: () => openHead(r)}, headName(r))),
      MEASURES.slice(1).map(x => h("td", {class: "num"}, measured(r, x[0])))); };
  return h("div", {class: "tablebox tall"}, h("table", {class: "lines"}, h("caption", {class: "sr"}, "measures of every head"),
    h("thead", {}, h("tr", {}, ["head", ...MEASURES.slice(1).map(x => x[1])].map(t => h("th", {scope: "col"}, t)))),
    h("tbody", {}, chosen.map(row))));
}
function gridLayers(chosen) {
  const per = S.now.heads / S.now.kv_heads; let o = 0;
  const group = (layer, kv) => h("span", {class: "kvgroup", title: `layer ${layer}, KV head ${kv}`},
    chosen.filter(k => G.data.heads[k].layer === layer && Math.floor(G.data.heads[k].head / per) === kv).map(k => thumb(k, o++)));
  return h("div", {class: "gridrows"}, G.data.layers.map(layer => h("div", {class: "gridrow"},
    h("span", {class: "num soft"}, layer),
    Array.from({length: S.now.kv_heads}, (_, kv) => group(layer, kv)))));
}
gridbody.addEventListener("keydown", e => {
  const t = e.target.closest(".thumb"); if (!t) return;
  const all = [...gridbody.querySelectorAll(".thumb")], i = all.indexOf(t), per = G.by === "layer" ? S.now.heads : 10;
  const to = {ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + per, ArrowUp: i - per, Home: 0, End: all.length - 1}[e.key];
  if (to === undefined || !all[to]) return;
  e.preventDefault(); t.tabIndex = -1; all[to].tabIndex = 0; all[to].focus();
});
