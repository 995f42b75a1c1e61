/* The cache map through time, and the life of one token. Needs `S` from attention.js and `hatchPattern` from map.js. */
const cmap = h("canvas", {class: "cachecanvas", height: 10, width: 10, tabindex: "0", role: "application",
  "aria-label": "cache map, layers by tokens: arrow keys choose a token, Enter tells its life"});
const slider = h("input", {type: "range", "aria-label": "step of the run", min: 0, max: 1, value: 1});
const still = matchMedia("(prefers-reduced-motion: reduce)"); // then nothing moves by itself: a press is a step
const playbutton = h("button", {type: "button", class: "plain play", onclick: () => play()});
const cnote = h("span", {class: "num"}), clegend = h("span", {class: "key"}),
  lifebox = h("div", {class: "life", "aria-live": "polite"});
const kvpick = h("select", {"aria-label": "KV head of the cache map"}), ctable = h("div");
const cerror = h("p", {class: "soft", hidden: true}), cmark = h("div", {class: "cachemark"}),
  ctoken = h("div", {class: "cachetoken"});
const cdetails = h("details", {class: "figtable"}, h("summary", {}, "Table: entries by layer at this step"), ctable);
const clayers = h("div", {class: "axis down num", "aria-hidden": "true"}),
  ctokens = h("div", {class: "axis num", "aria-hidden": "true"});
const cbody = h("div", {class: "cachebody"}, h("div", {class: "cacheplot"}, clayers,
  h("div", {class: "cachewrap"}, cmap, cmark, ctoken), ctokens), h("div", {class: "playrow"}, playbutton, slider));
const cachebox = h("section", {class: "cachebox", "aria-label": "cache map"},
  h("div", {class: "row"}, h("span", {class: "h"}, "Cache map · layers × tokens"), cnote, kvpick, h("span", {class: "sp"}),
    clegend),
  cerror, cbody, lifebox, cdetails);
const WIDTHS = ["16", "8", "4", "3", "2", "0"], widthName = b => b === "0" ? "evicted" : `${b} bit`;
let cacheAsk = 0, lastCache = null, stops = null, lifeToken = null, lifeAsk = 0, playing = null;

function cacheReset() { // answers about what was there before are no longer wanted
  cacheAsk++; stops = null; pause(); forgetLife();
}
const stopRow = () => stops ? stops[Number(slider.value)] : null;
const stepOf = row => row - S.now.prompt + 1; // the first generated token that is fed is step 1
function stepName(row) {
  return stepOf(row) > 0 ? `step ${fmt.int(stepOf(row))} of ${fmt.int(S.now.tokens - S.now.prompt)}`
    : row === S.now.prompt - 1 ? "the prompt is read" : `the prompt is read up to token ${fmt.int(row)}`;
}
const drawCache = debounce(() => { drawLarge(); return askCache(); }, 60);
async function askCache() {
  if (!S.now) return;
  const mine = ++cacheAsk, cols = [Math.floor(V.c), Math.ceil(V.c + V.span)], kv = kvpick.value || "all";
  const a = await server.cache({key: S.key, letter: S.letter, row: stopRow(), kv, cols, width: 1056}).catch(() => null);
  if (mine !== cacheAsk || !a) return;
  cerror.hidden = !a.error; for (const part of [cbody, clegend, cdetails, kvpick]) part.hidden = !!a.error;
  if (a.error) {
    pause(); cerror.textContent = a.error; cnote.textContent = ""; lifebox.replaceChildren(); lastCache = null; return;
  }
  if (!stops) { stops = a.stops; slider.max = stops.length - 1; slider.value = stops.length - 1; }
  lastCache = a; a.bytes = bytes(a.data); paintCache();
  cnote.textContent = stepName(a.row); slider.setAttribute("aria-valuetext", cnote.textContent);
  const all = Object.values(a.totals).reduce((x, y) => x + y, 0) || 1;
  const mapped = S.whole() ? null : h("span", {}, h("s", {class: "layerkey"}), `layer ${S.layer}, the map's`);
  swap(clegend, mapped, ...WIDTHS.filter(b => a.totals[b]).map(b => h("span", {}, h("s", {class: `bits b${b}`}),
    widthName(b) + " ", h("b", {class: "num"}, Math.round(a.totals[b] / all * 100) + "%"))));
  const shown = WIDTHS.filter(b => a.layers[b]);
  swap(ctable, h("div", {class: "tablebox tall"}, h("table", {class: "lines"},
    h("caption", {class: "sr"}, `entries at ${stepName(a.row)}`),
    h("thead", {}, h("tr", {}, ["layer", ...shown.map(widthName)].map(t => h("th", {scope: "col"}, t)))),
    h("tbody", {}, Array.from({length: S.now.layers_total}, (_, l) => h("tr", {}, h("th", {scope: "row", class: "num"}, l),
      shown.map(b => h("td", {class: "num"}, fmt.int(a.layers[b][l])))))))));
}
/* Playing: one stop of the slider after another, each once the one before it is drawn; it ends at the last. */
function pause() { playing = null; playWord(); }
function playWord() {
  playbutton.textContent = still.matches ? "Next step" : playing ? "Pause" : "Play";
  playbutton.title = still.matches ? "one step on" : "what the cache holds, step by step (Space)";
}
async function play() {
  if (playing) return pause();
  if (!stops) return;
  const last = () => Number(slider.value) >= stops.length - 1, mine = playing = {};
  if (last()) slider.value = 0; else slider.value = Number(slider.value) + 1;
  if (still.matches) { pause(); return askCache(); }
  for (playWord(); playing === mine;) {
    await askCache(); if (playing !== mine) return;
    await new Promise(done => setTimeout(done, Math.max(80, Math.min(400, 12000 / stops.length))));
    if (playing !== mine) return;
    if (last() || !cmap.offsetParent) pause(); else slider.value = Number(slider.value) + 1;
  }
}
still.addEventListener("change", pause); playWord();
function paintCache() {
  const a = lastCache; if (!a) return;
  const cell = Math.max(3, Math.min(12, Math.round(132 / a.h))), gap = cell > 5 ? 1 : 0;
  const W = Math.max(a.w, Math.min(1056, cmap.parentNode.clientWidth || 1056) | 0);
  cmap.width = W; cmap.height = a.h * cell; const g = cmap.getContext("2d");
  const colour = Object.fromEntries([16, 8, 4, 3, 2].map(b => [b, css(`--b${b}`)]));
  const hatch = hatchPattern ? g.createPattern(hatchPattern, "repeat") : css("--b0");
  for (let y = 0; y < a.h; y++) for (let x = 0; x < a.w; x++) {
    const b = a.bytes[y * a.w + x]; if (b === 255) continue;
    const x0 = Math.floor(x * W / a.w), x1 = Math.floor((x + 1) * W / a.w);
    g.fillStyle = b === 0 ? hatch : colour[b] || "#888"; g.fillRect(x0, y * cell, Math.max(1, x1 - x0), cell - gap);
  }
  const ends = (first, name, end) => [first, name, end].map(t => h("span", {}, t));
  swap(clayers, ends("0", "layer", S.now.layers_total - 1));
  swap(ctokens, ends(fmt.int(a.cols[0]), "token", fmt.int(a.cols[1] - 1)));
  cmark.hidden = S.whole(); cmark.style.top = S.layer / a.h * 100 + "%"; cmark.style.height = 100 / a.h + "%";
  const [c0, c1] = a.cols, there = lifeToken !== null && lifeToken >= c0 && lifeToken < c1;
  ctoken.hidden = !there; if (there) ctoken.style.left = (lifeToken + .5 - c0) / (c1 - c0) * 100 + "%";
}
slider.addEventListener("input", () => { pause(); drawCache(); });
slider.addEventListener("keydown", e => { if (e.key === " ") { e.preventDefault(); play(); } });
kvpick.addEventListener("change", drawCache);
cmap.addEventListener("click", e => {
  if (!lastCache) return;
  const r = cmap.getBoundingClientRect(), [c0, c1] = lastCache.cols;
  tellLife(Math.min(Math.floor(c0 + (e.clientX - r.left) / r.width * (c1 - c0)), S.tokens.length - 1), cachebox);
});
cmap.addEventListener("keydown", e => {
  if (!lastCache) return;
  const at = lifeToken === null ? lastCache.cols[0] : lifeToken, step = e.shiftKey ? 10 : 1, last = S.tokens.length - 1;
  const to = {ArrowRight: at + step, ArrowLeft: at - step, Home: 0, End: last}[e.key];
  if (to !== undefined) { e.preventDefault(); tellLife(Math.max(0, Math.min(last, to)), cachebox); }
  else if (e.key === "Enter") { e.preventDefault(); S.chooseRow(at, true, cachebox); }
  else if (e.key === " ") { e.preventDefault(); play(); }
});

const many = (n, all) => n === all ? "all" : fmt.int(n);
function when(row) { // in the words of the slider
  return stepOf(row) > 0 ? `at step ${fmt.int(stepOf(row))}` : row === S.now.prompt - 1 ? "when the prompt was read"
    : `when the prompt was read up to token ${fmt.int(row)}`;
}
function happened(v, entries) { // one line of a life
  const of = v.entries === entries ? "" : ` (${fmt.int(v.entries)} of ${fmt.int(entries)} entries)`;
  const names = v.into.slice(0, 3).map(([i, n]) => [h("button", {type: "button", class: "link", onclick: () => tellLife(i)},
    h("code", {}, fmt.tok(S.tokens[i]))), ` ${fmt.int(i)} (${fmt.int(n)})`]);
  const into = names.length ? [" into ", names.flatMap((x, k) => k ? [", ", ...x] : x),
    v.targets > 3 ? ` and ${fmt.int(v.targets - 3)} others` : "",
    v.shared > 1 ? `, each shared among up to ${v.shared}` : ""] : [];
  const written = v.what === "written" && stepOf(v.row) <= 0 ? "while the prompt was read" : when(v.row);
  return [v.what === "narrowed" ? `narrowed to ${v.bits} bit` : v.what, into, " ", written, of];
}
function forgetLife() {
  lifeAsk++; lifeToken = null; lifebox.replaceChildren(); ctoken.hidden = true;
}
const beside = () => fingers || innerWidth <= 900 ? pinlife : attside; // where a map's cell is told of: in sight of it
async function tellLife(i, home) {
  lifeToken = i; paintCache();
  if (home === cachebox) cdetails.before(lifebox); else if (home) home.append(lifebox);
  const mine = ++lifeAsk, a = await server.life({key: S.key, letter: S.letter, token: i}).catch(() => null);
  if (mine !== lifeAsk || !a) return;
  const entries = S.now.layers_total * S.now.kv_heads;
  const title = h("div", {class: "row"}, h("span", {class: "h"}, "Life of token ", h("span", {class: "num"}, fmt.int(i))),
    h("code", {}, fmt.tok(S.tokens[i])), h("span", {class: "sp"}),
    h("button", {type: "button", class: "quiet", "aria-label": "close the life of this token", onclick: forgetLife}, "Close"));
  const whole = h("p", {class: "soft note"}, `${fmt.int(entries)} entries in the cache, one for each of `
    + `${fmt.int(S.now.layers_total)} layers × ${fmt.int(S.now.kv_heads)} KV heads`);
  if (a.error) { swap(lifebox, title, h("p", {class: "soft note"}, a.error)); return; }
  const shown = a.events.slice(0, 12), rest = a.events.length - shown.length;
  const ends = a.detail.filter(d => d.bits === 0).length, alive = entries - ends;
  const story = shown.map(v => h("li", {}, happened(v, entries)));
  if (rest > 0) story.push(h("li", {class: "soft"}, `and at ${fmt.int(rest)} more steps, see the table`));
  story.push(h("li", {}, alive === 0 && !a.more ? "nothing of it was left at the end" : a.more ? ""
    : `${many(alive, entries)} of ${fmt.int(entries)} entries still there at the end`));
  swap(lifebox, title, whole, h("ol", {class: "story"}, story.filter(x => x.textContent)),
    a.detail.length ? h("details", {class: "figtable"}, h("summary", {}, "Table: entry by entry"), lifeTable(a)) : null);
}
function lifeTable(a) {
  const run = ([a, b]) => a === b ? fmt.int(a) : `${fmt.int(a)} to ${fmt.int(b)}`;
  const into = d => d.into.length ? [h("code", {}, fmt.tok(S.tokens[d.into[0][0]])), ` ${d.into.map(run).join(", ")}`] : "";
  return h("div", {class: "tablebox tall"}, h("table", {class: "lines"}, h("caption", {class: "sr"},
    "what befell each entry of the token"),
    h("thead", {}, h("tr", {}, ["when", "layer", "KV head", "what", "into"].map(t => h("th", {scope: "col"}, t)))),
    h("tbody", {}, a.detail.map(d => h("tr", {}, h("th", {scope: "row"}, when(d.row)),
      h("td", {class: "num"}, d.layer),
      h("td", {class: "num"}, d.kv), h("td", {}, d.what === "narrowed" ? `narrowed to ${d.bits} bit` : d.what),
        h("td", {}, into(d)))))),
    a.more ? h("p", {class: "soft note"}, `${fmt.int(a.more)} more.`) : null);
}
