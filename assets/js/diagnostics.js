/* The list of diagnostics. value = {key, variants, total, list, kept, chosen, letter, fraction, problem, done}. What a person
   gives is kept here by diagnostic; triggers 'compute' or 'probe' with {key, letter, name, given, show}. */
const D = {key: null, name: null, letter: null, given: {}, asked: null, stopping: false, done: null, pinned: null};
const node = (tag, more) => h(tag, {maxlength: 40000, autocomplete: "off", spellcheck: "false", ...more});
const given = name => (D.given[name] = D.given[name] || {});
const has = (v, name) => ((v.kept || {})[D.letter] || []).includes(name);
const running = v => D.asked || (v.fraction === undefined ? null : {name: v.chosen, letter: v.letter});
const titled = name => (((props.value || {}).list || []).find(x => x.name === name) || {}).title;
function start(d, show) {
  D.asked = {name: d.name, letter: D.letter}; D.stopping = false;
  trigger(d.model && !show ? "probe" : "compute", {key: props.value.key, letter: D.letter, name: d.name, given: given(d.name),
    show});
  draw();
}
function choose(d) {
  D.name = D.name === d.name ? null : d.name;
  const v = props.value, done = D.done && D.done.name === d.name && D.done.letter === D.letter;
  if (D.name && has(v, d.name) && !done && !running(v)) start(d, true); else draw();
}
function field(d, i) {
  const mine = given(d.name), id = `d-${d.name}-${i.name}`, area = i.kind === "documents" || i.kind === "prompts";
  const text = mine[i.name] !== undefined ? mine[i.name] : "", keep = e => { mine[i.name] = e.target.value; };
  const common = {id, "data-key": id, oninput: keep, onchange: keep};
  const box = area ? node("textarea", {...common, rows: 7}) : node("input", {...common, type: "text", inputmode:
    i.kind === "number" || i.kind === "position" ? "numeric" : null, placeholder: i.default === null ? "" : String(i.default)});
  box.value = area && mine[i.name] === undefined ? i.example : text;
  const put = (value, words) => h("button", {type: "button", class: "quiet", onclick: () => { mine[i.name] = value; draw(); }},
    words);
  return h("div", {class: "given" + (area ? " wide" : "")}, h("label", {for: id}, i.label), box,
    h("span", {class: "soft note"}, i.help,
    i.kind === "position" && D.pinned !== null ? put(String(D.pinned), `use the pinned row, ${fmt.int(D.pinned)}`) : null,
    area && mine[i.name] !== undefined && mine[i.name] !== i.example ? put(undefined, "back to the example") : null));
}
function stop() { // said at once; the work itself ends at its next check
  const gone = () => { D.stopping = false; draw(); };
  D.stopping = true; draw();
  server.stop({key: props.value.key}).then(r => { if (!(r && r.stopped)) gone(); }, gone);
}
function working(d, v) {
  const now = running(v), part = Math.round((v.fraction || 0) * 100);
  if (!now) return h("button", {type: "button", class: "plain", "data-key": "d-run", onclick: () => start(d, false)},
    `Run on ${D.letter}`);
  if (now.name !== d.name || now.letter !== D.letter) return [h("span", {class: "soft note"},
    `${titled(now.name)} of ${now.letter} is running, ${part}%. One runs at a time.`),
    h("button", {type: "button", class: "quiet", "data-key": "d-there",
      onclick: () => { D.name = now.name; D.letter = now.letter; draw(); }}, "Go to it")];
  return [h("progress", {max: 1, value: v.fraction || 0, "aria-label": "progress"}), h("span", {class: "num"}, `${part}%`),
    h("button", {type: "button", class: "quiet", "data-key": "d-stop", disabled: D.stopping, onclick: stop},
      D.stopping ? "Stopping" : "Cancel")];
}
function describe(d, v) {
  const variant = v.variants.find(x => x.letter === D.letter), some = variant && variant.layers.length
    && v.total > variant.layers.length;
  const facts = [d.model ? "feeds tokens through the loaded model again" : "", d.captures && some
    ? `captured layers only: ${variant.layers.join(", ")} of ${v.total}` : "",
      has(v, d.name) ? "a result is kept with this run" : ""];
  const bare = d.captures && variant && !variant.layers.length ? [`Variant ${D.letter} holds no captured attention: replay it, `
    + "above."] : [], told = [...(d.before || []), ...bare];
  return h("div", {class: "probe"}, h("p", {}, d.help), h("p", {class: "soft"}, d.explanation),
    h("p", {class: "soft note"}, h("a", {href: `https://arxiv.org/abs/${d.arxiv}`, target: "_blank", rel: "noopener noreferrer"},
      d.paper),
      ` · ${d.year}`, facts.filter(Boolean).map(f => ` · ${f}`)),
    told.length ? h("p", {class: "before"}, told.join(" ")) : null,
    d.inputs.map(i => field(d, i)), h("div", {class: "row"}, working(d, v)),
    v.problem && v.chosen === d.name ? h("p", {class: "why", role: "alert"}, v.problem) : null);
}
function result(v) {
  const done = D.done, d = v.list.find(x => x.name === done.name) || {};
  const read = done.read ? ` · the first ${fmt.int(done.read[0])} of ${fmt.int(done.read[1])} tokens` : "";
  const layers = d.captures && done.layers && done.layers.length < v.total ? ` · layers ${done.layers.join(", ")}` : "";
  return [h("p", {class: "soft note", role: "status"}, `Below: ${d.title} of ${done.letter}${read}${layers}.`),
    done.numbers.length ? h("p", {class: "numbers"}, done.numbers.map(([before, x, after]) =>
      h("span", {}, before, h("b", {class: "num"}, x), after))) : null,
    (done.absent || []).map(([title, why]) => h("p", {class: "soft note"}, `No figure "${title}": ${why}`))];
}
function draw() {
  const v = props.value || {}, focus = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  if (D.key !== v.key) {
    D.key = v.key; D.asked = null; D.stopping = false;
    const first = v.variants && v.variants.length ? v.variants[0].letter : null;
    if (!(v.variants || []).some(x => x.letter === D.letter)) D.letter = first;
  }
  if (!v.key) { swap(element); return; }
  const d = v.list.find(x => x.name === D.name);
  const letter = x => h("button", {type: "button", title: x.title, "data-key": `d-${x.letter}`,
    "aria-pressed": String(x.letter === D.letter),
    onclick: () => { D.letter = x.letter; const one = v.list.find(y => y.name === D.name);
      if (one && has(v, one.name) && !running(v)) start(one, true); else draw(); }},
    x.letter);
  const chip = x => h("button", {type: "button", class: "chip" + (has(v, x.name) ? " kept" : ""), "data-key": `p-${x.name}`,
    "aria-pressed": String(x.name === D.name), title: has(v, x.name) ? "computed and kept with this run"
      : x.model ? "needs the model" : "reads the run alone", onclick: () => choose(x)}, x.title);
  swap(element, h("section", {class: "gridbox", "aria-label": "diagnostics"},
    h("div", {class: "row"}, h("span", {class: "h"}, "Diagnostics of the literature"), v.variants.length > 1
      ? h("span", {class: "seg small", role: "group", "aria-label": "variant to look at"}, v.variants.map(letter)) : null),
    h("div", {class: "chips probelist"}, v.list.map(chip)), d ? describe(d, v) : null, D.done ? result(v) : null));
  if (!focus) return;
  const back = element.querySelector(`[data-key="${CSS.escape(focus)}"]`)
    || element.querySelector('[data-key="d-run"], [data-key="d-stop"]');
  if (back) back.focus();
}
addEventListener("al-variant", e => { // the variant that the map shows is the one to look at next
  const v = props.value || {}; if (running(v) || D.done || e.detail === D.letter
    || !(v.variants || []).some(x => x.letter === e.detail)) return;
  D.letter = e.detail; draw();
});
addEventListener("al-pin", e => { D.pinned = e.detail; const v = props.value || {},
  d = (v.list || []).find(x => x.name === D.name);
  if (d && d.inputs.some(i => i.kind === "position") && !element.contains(document.activeElement)) draw(); });
function heard() { // figures stay, and so does what they are, while another is computed and when it is refused or cancelled
  const v = props.value || {};
  if (v.key !== D.key) D.done = null;
  if (v.fraction === undefined) { D.asked = null; D.stopping = false; if (!v.problem) D.done = v.done || null; }
  if (v.chosen && D.name === null) D.name = v.chosen; draw();
}
watch("value", heard);
heard();
