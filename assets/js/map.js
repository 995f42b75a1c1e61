/* The attention map: a canvas over tiles of bytes from server.tile. Needs state `S` and callbacks from attention.js. */
const canvas = h("canvas", {class: "mapcanvas", tabindex: "0", role: "application",
  "aria-label": "attention map: arrow keys move, Enter pins, plus and minus zoom, Escape unpins"});
const live = h("div", {class: "sr", "aria-live": "polite"});
const cover = h("div", {class: "mapcover", hidden: true});
const maptip = h("div", {class: "al-tip", role: "tooltip", hidden: true});
document.body.append(maptip);
const mapbox = h("div", {class: "mapbox"}, canvas, cover, live);
/* Where fingers point there is no hovering: what a pinned cell holds is told below the map, and stays. */
let fingers = matchMedia("(hover: none), (pointer: coarse)").matches;
const pincell = h("div"), pincard = h("div", {class: "pincard", "aria-label": "the pinned cell", role: "group", hidden: true},
  pincell, h("button", {type: "button", class: "plain", "data-key": "release", onclick: () => S.setPin(null)}, "Release"));
let V = {r: 0, c: 0, span: 1}, tiles = {over: null, near: null}, wanted = 0, drawing = null, hover = null, cellAsk = 0;
let ramp = null, diverging = null, washed = {}, hatchPattern = null, sharpening = null;

const total = () => S.limit || (S.now || {}).tokens || 1;
function ramped(stops) { // 256 colours through five stops; byte 0 means that nothing is there
  const out = new Uint8ClampedArray(256 * 3);
  for (let b = 1; b < 256; b++) {
    const x = (b - 1) / 254 * 3.9999, i = Math.floor(x), f = x - i;
    for (let k = 0; k < 3; k++) out[b * 3 + k] = stops[i][k] + (stops[i + 1][k] - stops[i][k]) * f;
  }
  return out;
}
function wash(colour) { // the ramp over a wash of a bit width's colour, which fades as weights grow
  const c = hex(css(colour) || "#888888"), out = ramp.slice();
  for (let b = 1; b < 256; b++) {
    const part = .38 * (1 - (b - 1) / 254) + .04;
    for (let k = 0; k < 3; k++) out[b * 3 + k] = ramp[b * 3 + k] * (1 - part) + c[k] * part;
  }
  return out;
}
function palette() {
  ramp = ramped([0, 1, 2, 3, 4].map(i => hex(css(`--ramp${i}`) || "#888888")));
  diverging = ramped([0, 1, 2, 3, 4].map(i => hex(css(`--div${i}`) || "#888888")));
  washed = {}; for (const b of [8, 4, 3, 2]) washed[b] = wash(`--b${b}`);
  const p = h("canvas", {width: 8, height: 8}), g = p.getContext("2d");
  g.fillStyle = css("--b0"); g.fillRect(0, 0, 8, 8); g.strokeStyle = css("--hatch"); g.lineWidth = 1;
  g.beginPath(); for (const d of [-8, 0, 8]) { g.moveTo(d, 8); g.lineTo(d + 8, 0); } g.stroke();
  hatchPattern = p;
}
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
function paint(tile) {
  const data = tile.bytes, n = tile.w * tile.h, image = new ImageData(tile.w, tile.h), out = image.data;
  const shades = tile.signed ? diverging : ramp, bg = hex(css("--ramp0") || "#888888");
  for (let i = 0; i < n; i++) {
    const b = data[i], o = i * 4, from = tile.width && washed[tile.width[i]] || shades;
    for (let k = 0; k < 3; k++) out[o + k] = b ? from[b * 3 + k] : bg[k];
    out[o + 3] = 255;
  }
  tile.image = h("canvas", {width: tile.w, height: tile.h}); tile.image.getContext("2d").putImageData(image, 0, 0);
  tile.mask = null;
  if (tile.lost) {
    const m = new ImageData(tile.w, tile.h);
    for (let i = 0; i < n; i++) m.data[i * 4 + 3] = data[i] ? Math.min(110, tile.lost[i] >> 1) : tile.lost[i];
    tile.mask = h("canvas", {width: tile.w, height: tile.h}); tile.mask.getContext("2d").putImageData(m, 0, 0);
  }
}
function draw() {
  const side = canvas.width; if (!side || !ramp) return;
  const g = canvas.getContext("2d"), scale = side / V.span;
  g.imageSmoothingEnabled = false; g.globalCompositeOperation = "source-over";
  g.fillStyle = css("--ramp0"); g.fillRect(0, 0, side, side);
  for (const tile of [tiles.over, tiles.near]) {
    if (!tile) continue;
    const x = (tile.cols[0] - V.c) * scale, y = (tile.rows[0] - V.r) * scale;
    const w = tile.w * tile.col_step * scale, t = tile.h * tile.row_step * scale;
    g.drawImage(tile.image, x, y, w, t);
    if (tile.mask) {
      const s = h("canvas", {width: side, height: side}), q = s.getContext("2d");
      q.imageSmoothingEnabled = false; q.drawImage(tile.mask, x, y, w, t); q.globalCompositeOperation = "source-in";
      q.fillStyle = q.createPattern(hatchPattern, "repeat"); q.fillRect(0, 0, side, side); g.drawImage(s, 0, 0);
    }
  }
  const dpr = devicePixelRatio || 1, at = S.pin || S.cursor;
  const cross = (i, colour, dash) => line(g, (i - V.r) * scale, (i - V.c) * scale, css(colour), dpr, dash);
  if (S.now && S.now.prompt < total()) cross(S.now.prompt, "--soft", [3 * dpr, 4 * dpr]);
  if (S.minus && S.fork !== null && S.fork < total()) cross(S.fork, "--mark", []);
  if (!at) return;
  const accent = css("--accent"), x = (at.col - V.c) * scale, y = (at.row - V.r) * scale, s = Math.max(scale, 3 * dpr);
  g.fillStyle = accent; g.globalAlpha = S.pin ? .22 : .12;
  g.fillRect(0, y, side, Math.max(scale, dpr)); g.fillRect(x, 0, Math.max(scale, dpr), side);
  g.globalAlpha = 1; g.strokeStyle = accent; g.lineWidth = (S.pin ? 2 : 1) * dpr;
  g.strokeRect(x - dpr / 2, y - dpr / 2, s + dpr, s + dpr);
}
function line(g, y, x, colour, dpr, dash) {
  g.strokeStyle = colour; g.lineWidth = dpr; g.setLineDash(dash); g.globalAlpha = .6; g.beginPath();
  g.moveTo(0, Math.round(y) + .5); g.lineTo(canvas.width, Math.round(y) + .5);
  g.moveTo(Math.round(x) + .5, 0); g.lineTo(Math.round(x) + .5, canvas.height);
  g.stroke(); g.setLineDash([]); g.globalAlpha = 1;
}
function size() {
  const whole = stage.clientWidth; if (!whole) return;
  const narrow = whole < 860, most = Math.max(narrow ? 320 : 420, innerHeight * .86), dpr = Math.min(devicePixelRatio || 1, 2);
  const side = Math.round(Math.min(narrow ? whole : whole - 320, most));
  stage.style.setProperty("--map", side + "px");
  canvas.style.width = canvas.style.height = side + "px";
  if (canvas.width !== Math.round(side * dpr)) { canvas.width = canvas.height = Math.round(side * dpr); draw(); }
}

function clampView() {
  const t = total(); V.span = Math.max(Math.min(16, t), Math.min(t, V.span));
  V.r = Math.max(0, Math.min(t - V.span, V.r)); V.c = Math.max(0, Math.min(t - V.span, V.c));
  canvas.style.touchAction = V.span < t ? "none" : "pan-y";
}
let tileNumber = 0;
const session = Math.random().toString(36).slice(2);
async function fetchTile(rows, cols, id, more) {
  const signed = !!S.minus, view = {rows, cols, width: 512, height: 512, pool: S.pool, log: S.log};
  const answer = await server.tile({...S.ask(), id, ...view, ...more});
  if (answer.error) return answer;
  answer.bytes = bytes(answer.data); answer.lost = answer.evicted ? bytes(answer.evicted) : null;
  answer.width = answer.bits ? bytes(answer.bits) : null; answer.signed = signed; answer.log = view.log;
  answer.pool = answer.pool || view.pool;
  delete answer.data; delete answer.evicted; delete answer.bits;
  paint(answer); return answer;
}
async function watched(rows, cols, mine, tell, more) { // a tile whose progress is told, and that is given up once nobody waits
  const id = `${session}-${++tileNumber}`, key = S.key;
  const clock = setInterval(async () => {
    if (mine !== wanted) { clearInterval(clock); server.drawing({key, id, drop: true}).catch(() => null); return; }
    const a = await server.drawing({key, id}).catch(() => null);
    if (mine === wanted && a && a.fraction !== null) tell(a.fraction);
  }, 400);
  const tile = await fetchTile(rows, cols, id, more).catch(() => ({error: LOST}));
  clearInterval(clock); return tile;
}
const busy = on => mapbox.setAttribute("aria-busy", String(on)); // until the map of what was chosen is in sight
const undrawn = () => drawing === wanted; // the whole map is still on its way: nothing of it is sharpened
async function overview() {
  const mine = drawing = ++wanted, before = S.shown, choice = S.ask(), shades = {pool: S.pool, log: S.log};
  const same = before && Object.keys(choice).every(k => before[k] === choice[k]); sharpening = null; busy(true);
  if (!same) { tiles = {over: null, near: null}; draw(); }
  const stop = h("button", {type: "button", class: "plain", "data-key": "map-stop",
    onclick: () => {
      wanted++; say(null); busy(false);
      if (same && tiles.over) { // what was in sight before is still there
        Object.assign(S, before); drawTools(); note(); if (V.span < total()) near();
      } else if (before && before.key === S.key && !same) S.choose({...before});
      else S.trouble({error: "The drawing was cancelled."});
    }}, "Cancel");
  const share = h("p", {});
  const tile = await watched([0, total()], [0, total()], mine, f => {
    share.textContent = `Computing ${S.whole() ? "every head of every layer" : "the map"} · ${Math.round(f * 100)}%`;
    if (!stop.isConnected) { cover.hidden = false; swap(cover, share, h("div", {class: "row center"}, stop)); }
  });
  if (mine !== wanted) return;
  drawing = null; if (tile.error) return S.trouble(tile);
  S.shown = {...choice, ...shades}; say(null); tiles = {over: tile, near: null}; draw(); S.drawn(); busy(false);
  if (V.span < total()) near();
  if (S.head === "rollout") askRow(S.row); // its rows are only known once it was drawn
}
async function sharpen(more) {
  if (undrawn()) return;
  if (!tiles.over || tiles.over.stored || V.span >= total()) { if (tiles.near) { tiles.near = null; draw(); } return; }
  const mine = ++wanted, ends = x => [Math.floor(x), Math.ceil(x + V.span)];
  const tile = await watched(ends(V.r), ends(V.c), mine, f => { sharpening = f; S.drawn(); }, more);
  if (mine !== wanted) return;
  sharpening = null; if (!tile.error) tiles.near = tile; draw(); S.drawn();
}
const near = debounce(() => sharpen({}), 90);
function say(text) {
  const over = !text && S.replaying(); if (!text) S.waiting = null;
  if (over) gridDraw();
  cover.hidden = !text; swap(cover, text ? h("p", {}, text) : "");
}
function zoom(factor, px = .5, py = .5) {
  const span = Math.max(Math.min(16, total()), Math.min(total(), V.span * factor));
  V.c += (V.span - span) * px; V.r += (V.span - span) * py; V.span = span; clampView(); draw(); near(); S.moved();
}
function show(row, col) { // bring a cell into sight
  const pad = V.span * .1;
  if (row < V.r + pad || row > V.r + V.span - pad) V.r = row - V.span / 2;
  if (col < V.c + pad || col > V.c + V.span - pad) V.c = col - V.span / 2;
  clampView(); draw(); near();
}
function place(event) {
  const r = canvas.getBoundingClientRect(), px = (event.clientX - r.left) / r.width, py = (event.clientY - r.top) / r.height;
  const token = x => Math.max(0, Math.min(total() - 1, Math.floor(x)));
  return {px, py, row: token(V.r + py * V.span), col: token(V.c + px * V.span)};
}
canvas.addEventListener("wheel", e => {
  e.preventDefault(); const p = place(e); zoom(Math.exp(Math.max(-60, Math.min(60, e.deltaY)) * .008), p.px, p.py);
}, {passive: false});
let drag = null; const touches = new Map();
const gap = () => { const [a, b] = [...touches.values()]; return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY); };
canvas.addEventListener("pointerdown", e => {
  touches.set(e.pointerId, e); canvas.setPointerCapture(e.pointerId); fingers = e.pointerType === "touch";
  drag = {x: e.clientX, y: e.clientY, r: V.r, c: V.c, moved: false, pinch: touches.size === 2 ? gap() : 0};
});
canvas.addEventListener("pointermove", e => {
  if (touches.has(e.pointerId)) touches.set(e.pointerId, e);
  if (touches.size === 2 && drag) {
    const now = gap(); if (drag.pinch) zoom(drag.pinch / now); drag.pinch = now; drag.moved = true; return;
  }
  if (drag) {
    const unit = V.span / canvas.clientWidth, dx = e.clientX - drag.x, dy = e.clientY - drag.y;
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    drag.moved = true; maptip.hidden = true; V.c = drag.c - dx * unit; V.r = drag.r - dy * unit;
    clampView(); draw(); near(); S.moved(); return;
  }
  const p = place(e); hover = p; tip(p.row, p.col, e.clientX, e.clientY); if (!S.pin) S.point(p.row, p.col);
});
canvas.addEventListener("pointerup", e => {
  touches.delete(e.pointerId); const was = drag; drag = null;
  if (!was || was.moved) return;
  const p = place(e); S.setPin(S.pin && S.pin.row === p.row && S.pin.col === p.col ? null : p);
  if (!fingers) tip(p.row, p.col, e.clientX, e.clientY);
  else if (S.pin) pincard.scrollIntoView({block: "nearest"}); // the map may reach below the screen
});
canvas.addEventListener("pointercancel", e => { touches.delete(e.pointerId); drag = null; });
canvas.addEventListener("pointerleave", () => { hover = null; maptip.hidden = true; });
canvas.addEventListener("blur", () => { maptip.hidden = true; });
canvas.addEventListener("keydown", e => {
  const at = S.pin || S.cursor || {row: total() - 1, col: 0};
  const step = Math.max(1, Math.round(V.span / 512)) * (e.shiftKey ? 10 : 1), cut = i => Math.max(0, Math.min(total() - 1, i));
  const move = {ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step]}[e.key];
  if (move) {
    e.preventDefault(); const next = {row: cut(at.row + move[0]), col: cut(at.col + move[1])};
    if (S.pin) S.setPin(next); else S.point(next.row, next.col);
    show(next.row, next.col); tipAt(next); return;
  }
  if (e.key === "Escape") { S.setPin(null); maptip.hidden = true; e.preventDefault(); }
  else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); S.setPin(S.pin ? null : at); tipAt(at); }
  else if (e.key === "+" || e.key === "=") zoom(.7); else if (e.key === "-") zoom(1.4);
  else if (e.key === "0" || e.key === "Home") reset();
});
function reset() {
  V = {r: 0, c: 0, span: total()}; clampView(); tiles.near = null; sharpening = null;
  if (!undrawn()) wanted++; // what was being sharpened is no longer in sight
  draw(); S.moved();
}
function tipAt(at) {
  const r = canvas.getBoundingClientRect(), s = r.width / V.span;
  tip(at.row, at.col, r.left + (at.col + .5 - V.c) * s, r.top + (at.row + .5 - V.r) * s);
}
const exact = debounce(async (row, col, mine) => {
  const a = await server.cell({...S.ask(), row, col}).catch(() => null);
  if (mine === cellAsk && a && !a.error) fill(maptip, row, col, a);
}, 50);
let pinAsk = 0;
async function tellPin() { // the card below the map, where there is no pointer that hovers
  const mine = ++pinAsk, at = S.pin;
  pincard.hidden = !at || !fingers; if (pincard.hidden) return;
  maptip.hidden = true; fill(pincell, at.row, at.col, null);
  const a = await server.cell({...S.ask(), ...at}).catch(() => null);
  if (mine === pinAsk && a && !a.error) fill(pincell, at.row, at.col, a);
}
function tip(row, col, x, y) {
  const mine = ++cellAsk; fill(maptip, row, col, null); maptip.hidden = false;
  const w = maptip.offsetWidth, t = maptip.offsetHeight;
  maptip.style.left = Math.max(8, x + 18 + w > innerWidth ? x - w - 14 : x + 18) + "px";
  maptip.style.top = Math.max(8, Math.min(innerHeight - t - 8, y + 14)) + "px";
  exact(row, col, mine);
}
const signed = x => (x > 0 ? "+" : x < 0 ? "−" : "") + fmt.dec(Math.abs(x), 3);
const kept = a => a.bits === null || a.bits === undefined ? null
  : a.bits === 0 ? "evicted" : a.bits === 16 ? "kept exactly" : `kept at ${a.bits} bit`;
const strong = text => h("b", {class: "num"}, text);
function told(a) { // what a hovered cell says
  if (!a) return ["\u2026"];
  if (a.weight === null || a.weight === undefined)
    return [({future: "not yet written: the future", window: "outside the sliding window"})[a.why] || a.why || "not visible"];
  if (a.kept) return [`${a.pool === "mean" ? "mean" : S.minus ? "difference of the largest" : "largest"} of `
    + `${a.kept.join(" × ")} tokens ≈ `, strong(fmt.dec(a.weight, 3))];
  if (S.minus) return [`${S.letter} − ${S.minus} `, strong(signed(a.weight)), ` · ${S.minus} `, strong(fmt.dec(a.both[0], 3)),
    ` · ${S.letter} `, strong(fmt.dec(a.both[1], 3))];
  return [S.head === "rollout" ? "share " : "weight ", strong(fmt.dec(a.weight, 3)), " · rank ", strong(fmt.int(a.rank)), " of ",
    strong(fmt.int(a.of))];
}
function fill(box, row, col, a) {
  const names = S.tokens || [], tile = tiles.near || tiles.over, coarse = tile && tile.row_step > 1;
  const cache = a && a.weight !== null ? kept(a) : null;
  const group = tile && tile.group > 1 ? `, columns in groups of ${tile.group}` : "";
  swap(box,
    h("div", {}, h("span", {class: "num soft"}, `row ${fmt.int(row)} `), h("code", {}, fmt.tok(names[row])), " → ",
      h("span", {class: "num soft"}, `col ${fmt.int(col)} `), h("code", {}, fmt.tok(names[col]))),
    h("div", {}, told(a), cache ? " · " + cache : null),
    coarse && !(a && a.kept) || group ? h("div", {class: "soft"},
      `one cell shows ${tile.row_step} × ${tile.col_step} tokens${group}`) : null);
  if (a) live.textContent = box.textContent;
}
new MutationObserver(() => { palette(); for (const t of [tiles.over, tiles.near]) if (t) paint(t); draw(); S.recolour(); })
  .observe(document.body, {attributes: true, attributeFilter: ["class"]});
