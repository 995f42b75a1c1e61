/* Result columns. value = {run, live, cols:[{letter, head, dial, own[], forced[], note, strip, spec, writing}]} */
let mode = "own", drawnRun = null;
const root = h("div", {class: "cols"});
const bar = h("div", {class: "resultbar"});
swap(element, bar, root);
const tip = h("div", {class: "al-tip", role: "tooltip", id: "al-token-tip", hidden: true});
document.body.append(tip);
let held = null;

const line = (name, ...value) => h("div", {class: "tipline"}, h("span", {}, name), h("b", {class: "num"}, ...value));
const alternatives = (title, list) => !list || !list.length ? null : h("div", {class: "tipalt"}, h("small", {}, title),
  list.map(([text, p]) => h("div", {}, h("code", {}, text), h("i", {style: `width:${Math.max(1, parseFloat(p) * 90)}px`}), h("span", {class: "num"}, p))));
// Of two variants at one token: every figure says whose it is, and of which token where theirs differ.
const NOTES = {
  same: (me, ref) => `${me} and ${ref} wrote this token after the same text.`,
  fork: (me, ref, f) => ["The first difference: after the same text ", me, " wrote ", h("code", {}, f.t),
    f.r ? [", ", ref, " wrote ", h("code", {}, f.r)] : "", "."],
  after: (me, ref) => `After the first difference: ${me}’s own text, which ${ref} has not read.`,
  forced: (me, ref) => `${ref}’s token, as ${me} sees it after ${ref}’s text.`,
};
const CHOICES = {same: "here", fork: "here", after: "after its own text", forced: "after the reference’s text"};
function probabilities(f, me, ref) {
  const of = (who, text) => [`${who}’s probability`, f.k === "fork" && text ? [" of ", h("code", {}, text)] : ""];
  return [[of(me, f.t), f.p], [of(me, f.r), f.vp], [of(ref, f.r), f.rp]]
    .map(([name, p]) => p && p !== "–" ? line(name, p) : null);
}
function show(span) {
  if (!span || !span.dataset.h) return hide();
  const f = JSON.parse(span.dataset.h), cols = props.value.cols;
  const ref = cols[0].letter, me = cols[span.closest(".col").dataset.i].letter, says = NOTES[f.k];
  swap(tip,
    h("div", {class: "tiphead"}, h("code", {}, f.t),
      h("span", {class: "soft"}, `token ${f.n} of ${f.k === "forced" ? ref : me}`)),
    says ? h("div", {class: "tipnote"}, says(me, ref, f)) : null,
    probabilities(f, me, ref),
    f.h ? line(`${me}’s entropy`, f.h) : null,
    f.kl ? line(`KL(${ref} ‖ ${me})`, f.kl) : null,
    f.ok === undefined ? null : line(`${me}’s top choice`, f.ok ? `${ref}’s token` : `not ${ref}’s token`),
    f.c ? line("cache", f.c) : null, f.ms ? line("step", f.ms) : null,
    alternatives(`${me}’s choices ${CHOICES[f.k] || "here"}`, f.alt));
  tip.hidden = false;
  const r = span.getBoundingClientRect(), w = tip.offsetWidth, t = tip.offsetHeight;
  tip.style.left = Math.max(8, Math.min(innerWidth - w - 8, r.left)) + "px";
  tip.style.top = (r.bottom + t + 12 < innerHeight || r.top < t + 12 ? r.bottom + 8 : r.top - t - 8) + "px";
}
function hide() { tip.hidden = true; }
const spanOf = event => event.target.closest && event.target.closest(".t");
root.addEventListener("mouseover", e => { if (!held) { const s = spanOf(e); s ? show(s) : hide(); } });
root.addEventListener("mouseleave", () => { if (!held) hide(); });
root.addEventListener("focusin", e => { const s = spanOf(e); if (s) show(s); });
root.addEventListener("focusout", () => { held = null; hide(); });
root.addEventListener("click", e => { const s = spanOf(e); if (!s) { held = null; return hide(); }
  held = held === s ? null : s; focusOn(s); });
root.addEventListener("keydown", e => {
  const s = spanOf(e); if (!s) return;
  const all = [...s.closest(".text").querySelectorAll(".t")], i = all.indexOf(s);
  const to = {ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: all.length - 1}[e.key];
  if (e.key === "Escape") { held = null; hide(); s.blur(); return; }
  if (to === undefined || !all[to]) return;
  e.preventDefault(); focusOn(all[to]);
});
function focusOn(span) {
  span.closest(".text").querySelectorAll('.t[tabindex="0"]').forEach(t => { t.tabIndex = -1; });
  span.tabIndex = 0; span.focus({preventScroll: false});
}
addEventListener("scroll", () => { if (!held) hide(); }, {passive: true, capture: true});

function column(i) {
  const box = h("article", {class: "col", "data-i": i});
  box.innerHTML = '<header></header><div class="dialbox"></div><div class="text" role="group"></div><div class="notebox"></div><div class="stripbox"></div>';
  return box;
}
function put(node, markup) { if (node.dataset.m !== markup) { node.dataset.m = markup; node.innerHTML = markup; delete node.dataset.raw; } }
function text(node, fragments, writing) {
  // Fragments only grow while a stream runs, and a late one (its KL arrived) is replaced alone.
  const old = node._f || []; let changed = node._n === undefined || old.length > fragments.length;
  if (changed) { node.replaceChildren(); old.length = 0; }
  fragments.forEach((f, i) => {
    if (old[i] === f) return;
    const piece = h("span", {class: "p"}); piece.innerHTML = f;
    if (old[i] === undefined) node.append(piece); else node.children[i].replaceWith(piece);
    old[i] = f;
  });
  node._f = old; node._n = fragments.length;
  let caret = node.querySelector(".caret"); if (caret) caret.remove();
  if (writing) node.append(h("span", {class: "caret", "aria-hidden": "true"}));
  const first = node.querySelector(".t"); if (first && !node.querySelector('.t[tabindex="0"]')) first.tabIndex = 0;
}
function draw() {
  const v = props.value || {cols: []}, cols = v.cols || [];
  if (v.run !== drawnRun) { drawnRun = v.run; held = null; hide(); }
  const canForce = cols.some(c => (c.forced || []).length);
  if (!canForce) mode = "own";
  swap(bar, ...(canForce ? [h("span", {class: "seg", role: "group", "aria-label": "which text"},
    [["own", "Own text"], ["forced", "Reference text, teacher-forced"]].map(([key, name]) =>
      h("button", {type: "button", "aria-pressed": String(mode === key), onclick: () => { mode = key; draw(); }}, name))),
    h("span", {class: "legend soft"}, h("u", {class: "k1"}, "0.02"), h("u", {class: "k2"}, "0.1"), h("u", {class: "k3"}, "0.5 nats"),
      mode === "own" ? "underline: KL at that token, up to the first divergence" : "underline: KL at that token of A’s text")] : []));
  bar.hidden = !canForce;
  while (root.children.length > cols.length) root.lastChild.remove();
  cols.forEach((c, i) => {
    let box = root.children[i]; if (!box) { box = column(i); root.append(box); }
    box.className = `col v${c.letter}`; box.setAttribute("aria-label", `result ${c.letter}`);
    const [head, dial, body, note, strip] = box.children;
    put(head, c.head);
    if (!note.firstChild) note.append(h("div"), h("span", {}, h("button", {type: "button", class: "quiet", "aria-label": `copy the text of ${c.letter}`,
        onclick: e => copy([...body.querySelectorAll(".t")].map(t => t.textContent.replace(/⏎\n/g, "\n")).join(""), e.currentTarget)}, "Copy text"),
      h("button", {type: "button", class: "quiet", "aria-label": `copy the specification of ${c.letter}`, onclick: e => copy(props.value.cols[i].spec, e.currentTarget)}, "Copy spec")));
    put(dial, c.dial); put(note.firstChild, c.note); put(strip, c.strip);
    const forced = mode === "forced" && (c.forced || []).length;
    body.classList.toggle("forced", !!forced);
    if (body._mode !== mode + v.run) { body._mode = mode + v.run; body._n = undefined; }
    text(body, forced ? c.forced : c.own, c.writing);
    body.setAttribute("aria-label", `text of ${c.letter}, arrow keys move between tokens`);
    body.dataset.waiting = !c.own.length && c.writing ? "1" : "";
  });
}
draw(); watch("value", draw);
