/* The pipeline as navigation and the variant cards. value = {variants: [{techniques: [{name, params}]}], rev}
   props.catalog = {slots: [...], techniques: [...]}; server.plan({...}) answers titles, conflicts and predicted bytes. */
const catalog = props.catalog || {slots: [], techniques: []}, L = "ABCD", MOST = 4;
const byName = Object.fromEntries(catalog.techniques.map(t => [t.name, t]));
let variants = clone((props.value || {}).variants || [{techniques: []}]), notes = [], past = [], openSlot = null, openCard = null, openHelp = null, heir = null;
let promptTokens = window.alPromptTokens || null, newTokens = window.alNewTokens || 64, samples = window.alSamples || 1, asked = 0;
function clone(x) { return JSON.parse(JSON.stringify(x)); }
const has = (i, name) => variants[i].techniques.find(t => t.name === name);
const defaults = t => Object.fromEntries(t.parameters.map(p => [p.name, p.default]));
const declared = name => byName[name] || {name, title: name, slots: [], parameters: []}; // a saved run's may be gone
const order = t => Math.min(...(t.slots.length ? t.slots.map(s => catalog.slots.findIndex(x => x.name === s)) : [99]));

function commit(next, label, again) { // `again`: the change, for other variants than those it was made on
  if (label) past.push({variants: clone(variants), label, again});
  if (past.length > 30) past.shift();
  variants = next; props.value = {variants: clone(variants), rev: ((props.value || {}).rev || 0)};
  draw(); plan();
}
// Undo does what its button said when it was pressed: a number that was typed until then is taken by the same press, and stays.
function undo(last) {
  const at = past.indexOf(last); if (at < 0) return;
  const [, ...newer] = past.splice(at);
  heir = "more"; commit(last.variants);
  for (const {again, label} of newer) { const next = again && again(clone(variants)); if (next) commit(next, label, again); }
}
function toggle(i, name) {
  const next = clone(variants), t = declared(name);
  if (has(i, name)) next[i].techniques = next[i].techniques.filter(x => x.name !== name);
  else { next[i].techniques.push({name, params: defaults(t)});
    next[i].techniques.sort((a, b) => order(declared(a.name)) - order(declared(b.name))); }
  commit(next, `${t.title} ${has(i, name) ? "off" : "on"} in ${L[i]}`);
}
function setParam(i, name, key, value) {
  const set = next => {
    const found = next[i] && next[i].techniques.find(t => t.name === name); if (found) found.params[key] = value;
    return found && next;
  };
  const next = set(clone(variants)); // nothing where a field goes with its technique, and its last change comes after it
  if (next) commit(next, `${byName[name].title} ${key}`, set);
}
const plan = debounce(async () => {
  const mine = ++asked;
  try { const answer = await server.plan({variants, prompt_tokens: promptTokens, max_new_tokens: newTokens, samples});
    if (mine === asked) { notes = answer.variants || []; draw(); } } catch (e) { console.warn("plan", e); }
}, 70);

const share = p => budget(p) || p.unit === "fraction" || (p.type === "float" && p.max === 1 && /^Share/.test(p.help));
const percent = v => `${Number((v * 100).toFixed(v < .01 ? 2 : v < .1 ? 1 : 0))}%`;
const shown = (p, v) => v === null || v === undefined ? "auto" : share(p) && typeof v === "number" && v <= 1 ? percent(v)
  : typeof v === "number" ? v.toLocaleString("en-US") + (p.unit && p.unit !== "fraction" ? " " + p.unit : "") : String(v);
const short = (tech, params) => { // a budget or a width speaks for itself; other parameters by name, those that were changed
  const said = tech.parameters.filter(p => p.type !== "bool" && ![undefined, null, 0, "", "none", "all", "auto"].includes(params[p.name]));
  const changed = tech.parameters.filter(p => p.name in params && params[p.name] !== p.default);
  const own = said.find(p => budget(p) || p.name === "bits"), first = own || changed[0] || said[0], rest = changed.filter(p => p !== first);
  const word = p => p.type === "bool" ? `${params[p.name] ? "" : "no "}${p.name}` : `${p.name} ${shown(p, params[p.name])}`;
  const words = [first && (first === own ? shown(first, params[first.name]) : word(first)), rest.length && "· " + word(rest[0]),
    rest.length > 1 && `+${rest.length - 1}`];
  return [tech.title, ...words.filter(Boolean)].join(" ").replace(/_/g, " ");
};
const blocked = (i, name) => ((notes[i] || {}).blocked || {})[name];

function pipeline() {
  return h("nav", {class: "pipe", "aria-label": "pipeline: choose techniques by slot"}, catalog.slots.map(s => {
    const fills = [];
    variants.forEach((v, i) => v.techniques.forEach(t => { if (byName[t.name] && byName[t.name].slots.includes(s.name)) fills.push([i, t]); }));
    const grouped = {}; fills.forEach(([i, t]) => { (grouped[t.name] = grouped[t.name] || []).push(i); });
    return h("button", {type: "button", class: `slot ${s.side}${openSlot === s.name ? " on" : ""}${fills.length ? " full" : ""}`, "data-slot": s.name, "data-key": `slot-${s.name}`,
      "aria-expanded": String(openSlot === s.name), title: s.question, onclick: () => { openSlot = openSlot === s.name ? null : s.name; draw(); }},
      s.name, Object.keys(grouped).length ? Object.entries(grouped).slice(0, 2).map(([name, who]) =>
        h("i", {}, who.map(i => h("span", {class: `dot v${L[i]}`, "aria-label": L[i]})), byName[name].title))
        : h("i", {}, s.identity || "–"),
      Object.keys(grouped).length > 2 ? h("i", {}, `+${Object.keys(grouped).length - 2} more`) : null);
  }));
}
function cite(t) { const p = t.paper || {};
  return h("span", {class: "cite"}, p.url ? h("a", {href: p.url, target: "_blank", rel: "noopener noreferrer"}, p.title || p.arxiv) : p.title || "",
    p.year ? ` (${p.year})` : ""); }
function switcher(i, t, label) {
  const on = !!has(i, t.name), why = !on && blocked(i, t.name);
  return h("button", {type: "button", role: "switch", class: `switch v${L[i]}`, "aria-checked": String(on), "aria-disabled": why ? "true" : null,
    "data-key": `sw-${i}-${t.name}`, "aria-label": `${t.title} in ${L[i]}${why ? ": " + why : ""}`, title: why || (on ? "turn off" : "turn on"),
    onclick: () => { if (why) toast(why); else toggle(i, t.name); }}, label ? h("b", {}, label) : h("s", {}));
}
// What is pressed may go with the press: the focus goes on to its heir, so that the keyboard does not start at the page's top.
function closeSlot() { heir = `slot-${openSlot}`; openSlot = null; draw(); }
function closeCard() { heir = `edit-${openCard}`; openCard = null; draw(); }
element.addEventListener("keydown", e => {
  if (e.key !== "Escape" || e.defaultPrevented) return;
  if (openCard !== null && e.target.closest(".editor")) closeCard(); else if (openSlot && e.target.closest(".pipe, .slotpanel")) closeSlot();
});
function slotPanel() {
  const s = catalog.slots.find(x => x.name === openSlot); if (!s) return null;
  const list = catalog.techniques.filter(t => t.slots.includes(s.name));
  return h("section", {class: "slotpanel", "aria-label": `slot ${s.name}`},
    h("div", {class: "row"}, h("b", {}, s.name), h("span", {class: "soft"}, s.question), h("span", {class: "sp"}),
      h("button", {type: "button", class: "quiet", "data-key": "closeslot", onclick: closeSlot}, "Close")),
    list.length ? h("div", {class: "slotlist", "data-scroll": "slot"}, list.map(t => h("div", {class: "slotrow"},
      h("div", {}, h("b", {}, t.title), " ", cite(t), h("p", {class: "soft", title: t.help}, t.help)),
      h("div", {class: "letters"}, variants.map((_, i) => switcher(i, t, L[i]))))))
      : h("p", {class: "soft"}, `No technique fills this slot yet; it stays at “${s.identity || "nothing"}”.`));
}
function control(i, t, p, params) {
  const value = params[p.name], id = `al-${i}-${t.name}-${p.name}`, key = {"data-key": id, id, "aria-describedby": `${id}-h`};
  let input;
  if (p.choices && p.choices.length) input = h("select", {...key, onchange: e => setParam(i, t.name, p.name, p.choices[e.target.selectedIndex])},
    p.choices.map(c => h("option", {selected: c === value}, String(c))));
  else if (p.type === "bool") input = h("button", {...key, type: "button", role: "switch", class: `switch v${L[i]}`, "aria-checked": String(!!value),
    "aria-label": p.name, onclick: () => setParam(i, t.name, p.name, !value)}, h("s", {}));
  else if (p.type === "int" || p.type === "float") {
    const ranged = p.min !== null && p.min !== undefined && p.max !== null && p.max !== undefined;
    const step = p.type === "int" ? 1 : budget(p) || (ranged && p.max - p.min <= 2) ? 0.01 : 0.1;
    const box = h("input", {...key, type: "number", min: p.min, max: p.max, step: "any", value: value === null ? "" : value, onchange: e => {
      const before = value === null ? p.default : value;
      setParam(i, t.name, p.name, e.target.value.trim() === "" && p.default === null ? null
        : within(e.target.value, ranged ? p.min : -Infinity, ranged ? p.max : Infinity, p.type === "int", before, p.name)); }});
    input = h("span", {class: "ranged"}, ranged ? h("input", {type: "range", "data-key": id + "-r", "aria-label": p.name,
      min: scale(p, low(p)), max: scale(p, high(p)), step: logged(p) ? 0.01 : step, value: scale(p, Math.min(value === null ? p.min : value, high(p))),
      oninput: e => { box.value = unscale(p, e.target.value); }, onchange: e => setParam(i, t.name, p.name, unscale(p, e.target.value))}) : null, box,
      p.unit ? h("i", {}, p.unit) : null);
  } else input = h("input", {...key, type: "text", value: value === null ? "" : value, onchange: e => setParam(i, t.name, p.name, e.target.value)});
  return h("div", {class: "param"}, h("label", {for: id, title: p.help || ""}, p.name.replace(/_/g, " ")), input,
    h("small", {id: `${id}-h`, class: "soft"}, p.help || ""));
}
// Budgets take a share up to 1 or a count above it: the slider covers the shares, the box takes both.
const budget = p => p.type === "float" && p.max > 1000 && typeof p.default === "number" && p.default <= 1;
const low = p => budget(p) ? Math.min(p.default, 0.01) : p.min, high = p => budget(p) ? 1 : p.max;
// A count that spans orders of magnitude is dragged on a logarithmic track.
const logged = p => !budget(p) && (p.type === "int" ? p.max - p.min > 300 : p.min > 0 && p.max / p.min > 50);
const scale = (p, v) => logged(p) ? (p.type === "int" ? Math.log2(1 + v - p.min) : Math.log2(v / p.min)) : v;
const unscale = (p, x) => { const v = logged(p) ? (p.type === "int" ? p.min + 2 ** Number(x) - 1 : p.min * 2 ** Number(x)) : Number(x); return p.type === "int" ? Math.round(v) : Math.round(v * 1000) / 1000; };

function techniqueRow(i, t) {
  const on = has(i, t.name), why = !on && blocked(i, t.name), help = openHelp === `${i}-${t.name}`;
  return h("div", {class: `tech${on ? " on" : ""}${why ? " off" : ""}`},
    h("div", {class: "row"}, switcher(i, t), h("span", {class: "tname"}, t.title), h("span", {class: "slots"}, t.slots.join(" · ")), h("span", {class: "sp"}),
      h("button", {type: "button", class: "quiet", "data-key": `help-${i}-${t.name}`, "aria-expanded": String(help), "aria-label": `about ${t.title}`,
        onclick: () => { openHelp = help ? null : `${i}-${t.name}`; draw(); }}, "?")),
    why ? h("p", {class: "why", title: why}, why) : null,
    help ? h("div", {class: "about"}, h("p", {}, t.help), h("p", {class: "soft"}, cite(t)),
      t.saves ? h("p", {class: "soft"}, "Saves: " + t.saves + ". ", t.does_not_save || "") : null) : null,
    on && t.parameters.length ? h("div", {class: "params"}, t.parameters.map(p => control(i, t, p, on.params))) : null);
}
let filter = "";
function picker(i) {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const rest = catalog.techniques.filter(t => !has(i, t.name) && words.every(w => [t.name, t.title, t.help, (t.paper || {}).title, ...t.slots].join(" ").toLowerCase().includes(w)));
  const groups = catalog.slots.map(s => [s, rest.filter(t => order(t) === catalog.slots.indexOf(s))]).filter(([, list]) => list.length);
  return h("div", {class: "picker"}, h("input", {type: "search", placeholder: `Add one of ${catalog.techniques.length} techniques`, "aria-label": `find a technique for ${L[i]}`, "data-key": `find-${i}`,
    value: filter, oninput: e => { filter = e.target.value; draw(); }}),
    h("div", {class: "picklist", "data-scroll": `pick-${i}`}, groups.map(([s, list]) => [h("div", {class: "h", title: s.question}, s.name), list.map(t => techniqueRow(i, t))]),
      groups.length ? null : h("p", {class: "soft"}, "No technique matches.")));
}
function editor() {
  const i = openCard, v = variants[i]; if (!v) return null;
  return h("section", {class: `editor v${L[i]}`, "aria-label": `techniques of variant ${L[i]}`},
    h("div", {class: "techs"}, h("div", {class: "row"}, h("span", {class: "badge"}, L[i]), h("span", {class: "h"}, "Switched on"), h("code", {class: "soft spectext"}, (notes[i] || {}).spec || ""), h("span", {class: "sp"}),
      h("button", {type: "button", class: "quiet", "data-key": `spec-${i}`, title: (notes[i] || {}).spec || "", onclick: e => copy((notes[i] || {}).spec || "dense", e.currentTarget)}, "Copy spec"),
      h("button", {type: "button", class: "quiet", "data-key": "closeedit", onclick: closeCard}, "Done")),
      v.techniques.length ? v.techniques.map(t => byName[t.name] ? techniqueRow(i, byName[t.name]) : null)
      : h("p", {class: "soft"}, "Nothing yet: full attention, full cache. Add a technique from the list.")), picker(i));
}
function remedy(i, r) { // what a refusal says to do, as a button; Undo takes it back
  if (!r || !has(i, r.technique)) return null;
  const p = byName[r.technique].parameters.find(x => x.name === r.parameter);
  return h("button", {type: "button", class: "chip pick", "data-key": `remedy-${i}`,
    onclick: () => { heir = `edit-${i}`; setParam(i, r.technique, r.parameter, r.value); }}, `Set ${r.parameter.replace(/_/g, " ")} to ${shown(p, r.value)}`);
}
function card(v, i) {
  const n = notes[i] || {}, open = openCard === i, kv = n.kv;
  return h("article", {class: `card v${L[i]}${open ? " open" : ""}`, "aria-label": `variant ${L[i]}`},
    h("header", {}, h("span", {class: "badge"}, L[i]), h("h3", {title: n.spec || ""}, n.title || (v.techniques.length ? v.techniques.map(t => (byName[t.name] || t).title || t.name).join(" · ") : "Dense")),
      i === 0 ? h("span", {class: "chip"}, "reference") : null, h("span", {class: "sp"}),
      h("button", {type: "button", class: "quiet", "data-key": `edit-${i}`, "aria-expanded": String(open), onclick: () => { openCard = open ? null : i; draw(); }}, open ? "Done" : "Edit"),
      variants.length > 1 ? h("button", {type: "button", class: "quiet", "data-key": `rm-${i}`, "aria-label": `remove variant ${L[i]}`, title: "remove",
        onclick: () => { const next = clone(variants); next.splice(i, 1); openCard = null; heir = `edit-${Math.max(0, i - 1)}`; commit(next, `variant ${L[i]} removed`); }}, "×") : null),
    h("div", {class: "chips"}, v.techniques.length ? v.techniques.map(t => byName[t.name] ? h("button", {type: "button", class: "chip pick", "data-key": `chip-${i}-${t.name}`,
      title: "change its parameters", onclick: () => { openCard = i; draw(); }}, short(byName[t.name], t.params)) : h("button", {type: "button", class: "chip pick",
      "data-key": `chip-${i}-${t.name}`, "aria-label": `remove ${t.name}`, title: "remove", onclick: () => { heir = `add-${i}`; toggle(i, t.name); }}, `${t.name} ×`))
      : h("span", {class: "soft"}, "Full attention, full cache."),
      n.saves ? h("span", {class: "soft saves"}, n.saves) : null,
      h("button", {type: "button", class: "chip add", "data-key": `add-${i}`, onclick: () => { openCard = i; draw(); }}, "+ technique")),
    (n.conflicts || []).map(c => h("p", {class: "why", role: "alert"}, c)), n.error ? h("p", {class: "why", role: "alert"}, n.error) : null,
    h("div", {class: "foot"}, kv ? h("span", {class: "kv"}, h("span", {class: "predmark", "aria-hidden": "true"}), "predicted KV ", h("b", {class: "num"}, kv.text), kv.ratio ? h("em", {}, " " + kv.ratio) : null,
      kv.at ? h("span", {class: "soft"}, " at " + kv.at) : null) : remedy(i, n.remedy) || h("span", {class: "soft"}, n.pending || "\u00a0")));
}
let drawing = 0;
const narrow = matchMedia("(max-width: 560px)"); // cards below each other: the editor opens under its own
narrow.addEventListener("change", () => draw());
// Deferred, so that a change event fired by Tab has moved the focus before the cards are redrawn.
function draw() { window.alVariants = variants; clearTimeout(drawing); drawing = setTimeout(render); }
function render() {
  const focus = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const scrolls = [...element.querySelectorAll("[data-scroll]")].map(n => [n.dataset.scroll, n.scrollTop]);
  const pipe = element.querySelector(".pipe"), scroll = pipe ? pipe.scrollLeft : 0, last = past[past.length - 1];
  swap(element, pipeline(), ...[slotPanel()].filter(Boolean),
    h("div", {class: "cardbar row"}, h("span", {class: "h"}, "Variants"), h("span", {class: "sp"}),
      last ? h("button", {type: "button", class: "quiet", "data-key": "undo", title: "undo: " + last.label, onclick: () => undo(last)},
        "Undo " + last.label) : null,
      h("button", {type: "button", class: "chip pick", "data-key": "more", disabled: variants.length >= MOST,
        title: variants.length >= MOST ? "four variants is the most" : "", onclick: () => { const next = clone(variants); next.push({techniques: []});
          openCard = next.length - 1; commit(next, `variant ${L[next.length - 1]} added`); }}, "+ Variant")),
    h("div", {class: "cards"}, variants.map((v, i) => [card(v, i), narrow.matches && i === openCard ? editor() : null])),
    narrow.matches ? null : editor());
  const again = element.querySelector(".pipe"); if (again) again.scrollLeft = scroll;
  const node = focus && [focus, heir].map(key => key && element.querySelector(`[data-key="${CSS.escape(key)}"]`)).find(Boolean);
  heir = null;
  if (node) node.focus({preventScroll: true});
  for (const [name, top] of scrolls) { const node = element.querySelector(`[data-scroll="${name}"]`); if (node) node.scrollTop = top; }
  const list = node && node.closest(".picklist"); // a technique that was just switched off: its row comes into sight
  if (list) { const at = node.getBoundingClientRect(), box = list.getBoundingClientRect();
    if (at.top < box.top || at.bottom > box.bottom) list.scrollTop += at.top - box.top - box.height / 2; }
}
addEventListener("al-prompt", e => { if (e.detail.tokens !== promptTokens) { promptTokens = e.detail.tokens; plan(); } });
addEventListener("al-settings", e => { const d = e.detail;
  if (d.max_new_tokens !== newTokens || d.samples !== samples) { newTokens = d.max_new_tokens; samples = d.samples; plan(); } });
draw(); render(); plan();
watch("value", () => { const next = (props.value || {}).variants || [{techniques: []}];
  if (JSON.stringify(next) !== JSON.stringify(variants)) { variants = clone(next); past = []; openCard = null; draw(); plan(); } });
