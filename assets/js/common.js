/* Shared by every component script; each file is a function body that gets
   element, trigger, props, server, upload and watch from gr.HTML. Text enters the page through
   textContent only; the single exception are fragments that lab/ui/components escaped in Python. */
const h = (tag, attrs, ...kids) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attrs || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else if (key === "style") node.style.cssText = value;
    else if (key === "value") node.value = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const kid of kids.flat(9)) if (kid !== null && kid !== undefined && kid !== false) node.append(kid);
  return node;
};
/* Drawing anew between the press of a button and its release would take the button from under the pointer, and the press would
   do nothing. What is drawn in that moment waits until the pointer is up. */
let pressed = null; const later = new Map();
const release = () => {
  pressed = null; const waiting = [...later]; later.clear();
  for (const [node, kids] of waiting) {
    const key = node.contains(document.activeElement) && document.activeElement.dataset.key; renew(node, kids);
    const again = key && node.querySelector(`[data-key="${CSS.escape(key)}"]`); if (again) again.focus({preventScroll: true});
  }
};
/* A field that somebody is typing in stays: a new one would lose the selection and what was typed. Everything around it is
   drawn anew, and it takes the drawn value unless a change of its own is still to come. */
let typing = null;
element.addEventListener("input", e => { typing = e.target; }, true);
for (const name of ["change", "focusout"]) element.addEventListener(name, () => { typing = null; }, true);
const ancestors = (node, top) => { const path = []; for (let n = node; n && n !== top; n = n.parentElement) path.unshift(n); return path; };
const renew = (node, kids) => {
  const field = document.activeElement, typed = field && node.contains(field) && field.matches("input, textarea");
  const key = typed && !kids.some(k => k.contains && k.contains(field)) && field.dataset.key;
  const box = key ? h("div", {}, kids) : null, twin = box && box.querySelector(`[data-key="${CSS.escape(key)}"]`);
  const kept = twin ? ancestors(field, node) : [], fresh = twin ? ancestors(twin, box) : [];
  if (!kept.length || kept.length !== fresh.length || kept.some((n, d) => n.tagName !== fresh[d].tagName)) {
    node.replaceChildren(...(box ? box.childNodes : kids)); return; }
  kept.forEach((keep, d) => {
    const parent = d ? kept[d - 1] : node, stands = fresh[d];
    for (const sibling of [...parent.childNodes]) if (sibling !== keep) sibling.remove();
    const around = [...stands.parentElement.childNodes], at = around.indexOf(stands);
    keep.before(...around.slice(0, at)); keep.after(...around.slice(at + 1));
    for (const {name} of [...keep.attributes]) if (!stands.hasAttribute(name)) keep.removeAttribute(name);
    for (const {name, value} of stands.attributes) if (keep.getAttribute(name) !== value) keep.setAttribute(name, value);
  });
  if (typing !== field && field.value !== twin.value) field.value = twin.value;
};
addEventListener("pointerdown", e => {
  pressed = element.contains(e.target) ? e.target.closest("button, input, summary") : null;
}, true);
addEventListener("click", () => { pressed = null; }, true); // what the click itself asks for is drawn at once
for (const name of ["pointerup", "pointercancel"])
  addEventListener(name, e => { setTimeout(release, e.pointerType === "touch" ? 300 : 0); }, true); // after its click
addEventListener("pointermove", e => { if (pressed && !e.buttons) release(); }, true); // it was let go outside the window
const swap = (node, ...kids) => {
  const all = kids.flat(9).filter(k => k !== null && k !== undefined && k !== false);
  if (pressed && node.contains(pressed)) later.set(node, all); else { later.delete(node); renew(node, all); }
};
const fmt = {
  int: n => (n === null || n === undefined) ? "–" : Math.round(n).toLocaleString("en-US"),
  dec: (n, d = 3) => (n === null || n === undefined || !isFinite(n)) ? "–"
    : (n !== 0 && Math.abs(n) < 0.5 * 10 ** -d) ? n.toExponential(1) : n.toFixed(d),
  tok: t => t === undefined ? "?" : /^\s*$/.test(t) && t ? t.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣")
    : t.replace(/\n/g, "⏎"),
};
const debounce = (fn, ms) => { let timer; return (...a) => { clearTimeout(timer); timer = setTimeout(() => fn(...a), ms); }; };
const css = name => getComputedStyle(element).getPropertyValue(name).trim();
const hex = text => { const c = text.replace("#", ""); return [0, 2, 4].map(i => parseInt(c.slice(i, i + 2), 16)); };
const copy = async (text, button) => {
  const done = ok => { if (!button) return; const was = button.textContent; button.textContent = ok ? "Copied" : "Could not copy";
    setTimeout(() => { button.textContent = was; }, 1400); };
  try { await navigator.clipboard.writeText(text); done(true); }
  catch { const box = h("textarea", {style: "position:fixed;opacity:0"}); box.value = text; document.body.append(box); box.select();
    done(document.execCommand("copy")); box.remove(); }
};
const download = file => {
  if (!file || !file.data) return;
  const bytes = Uint8Array.from(atob(file.data), c => c.charCodeAt(0));
  const link = h("a", {href: URL.createObjectURL(new Blob([bytes], {type: file.type})), download: file.name});
  document.body.append(link); link.click(); link.remove(); setTimeout(() => URL.revokeObjectURL(link.href), 4000);
};
const ACTION_MS = 30000;
const toast = (text, action, onaction) => { // one that only tells stands above one that offers something, and leaves it there
  const kind = action ? "al-toast offers" : "al-toast";
  document.querySelectorAll(".al-toast").forEach(t => { if (t.className === kind) t.remove(); });
  const box = h("div", {class: kind, role: "status", onclick: () => box.remove()}, h("span", {}, text),
    action ? h("button", {type: "button", onclick: () => { box.remove(); onaction(); }}, action) : null);
  let all = document.querySelector(".al-toasts"); if (!all) document.body.append(all = h("div", {class: "al-toasts"}));
  if (action) all.append(box); else all.prepend(box);
  setTimeout(() => box.remove(), action ? ACTION_MS : Math.max(4000, Math.min(20000, 60 * text.length)));
  return box;
};
const within = (text, min, max, whole, before, name) => { // a typed number, brought into its range with a word about it
  const typed = text.trim() === "" ? NaN : Number(text), n = whole ? Math.round(typed) : typed;
  if (!isFinite(n)) {
    const stays = before === null ? "auto" : before.toLocaleString("en-US");
    toast(`${name}: ${text.trim() ? `“${text.trim()}” is no number` : "nothing was entered"}; ${stays} stays.`); return before;
  }
  const fit = Math.min(max, Math.max(min, n));
  if (fit !== n) toast(`${name} goes from ${min.toLocaleString("en-US")} to ${max.toLocaleString("en-US")}: ${fit.toLocaleString("en-US")} is set.`);
  return fit;
};
const address = changes => {
  const url = new URL(location.href);
  for (const [key, value] of Object.entries(changes))
    if (value === null || value === undefined || value === "") url.searchParams.delete(key); else url.searchParams.set(key, value);
  history.replaceState(null, "", url);
};
const owner = () => {
  try { let key = localStorage.getItem("attention-lab-owner");
    if (!key) { key = [...crypto.getRandomValues(new Uint8Array(16))].map(b => b.toString(16).padStart(2, "0")).join("");
      localStorage.setItem("attention-lab-owner", key); } return key; } catch { return ""; }
};
if (!window.alTitles) { // where nothing hovers, a tap tells what a title would
  window.alTitles = true;
  document.addEventListener("click", e => {
    if (!matchMedia("(hover: none)").matches) return;
    const told = e.target.closest && e.target.closest("[title]");
    if (told && told.title && !e.target.closest("button, a, input, select, textarea, label, summary")) toast(told.title);
  });
}
