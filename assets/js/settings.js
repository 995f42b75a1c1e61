/* Preset and decoding controls. value = {presets, preset, mode, temperature, top_k, top_p, seed, samples, max_new_tokens, timing, limits} */
let v = Object.assign({}, props.value);
const tell = () => { const samples = v.mode === "sampled" ? v.samples || 1 : 1; window.alSettings = v; window.alNewTokens = v.max_new_tokens; window.alSamples = samples;
  dispatchEvent(new CustomEvent("al-settings", {detail: {max_new_tokens: v.max_new_tokens, samples}})); };
const send = (changes, redraw = true) => { v = Object.assign({}, v, changes); props.value = v; tell(); if (redraw) draw(); };
const num = (key, name, min, max, step, unit, title) => h("label", {class: "field", title: title || null}, h("span", {}, name),
  h("span", {class: "in"}, h("input", {type: "number", min, max, step, value: v[key], inputmode: "decimal", "aria-label": name, "data-key": `dec-${key}`,
    onchange: e => { const n = within(e.target.value, min, max, step === 1, v[key], name); e.target.value = n; send({[key]: n}, false); }}),
    unit ? h("i", {}, unit) : null));
const seg = (key, name, options) => h("div", {class: "field"}, h("span", {id: `al-${key}`}, name),
  h("span", {class: "seg small", role: "group", "aria-labelledby": `al-${key}`}, options.map(o =>
    h("button", {type: "button", "data-key": `dec-${key}-${o}`, "aria-pressed": String(v[key] === o), onclick: () => send({[key]: o})}, o))));
const flag = (key, name, off, on, title) => h("div", {class: "field", title}, h("span", {id: `al-${key}`}, name),
  h("span", {class: "seg small", role: "group", "aria-labelledby": `al-${key}`}, [[false, off], [true, on]].map(([value, text]) =>
    h("button", {type: "button", "data-key": `dec-${key}-${text}`, "aria-label": `${name}: ${text}`, "aria-pressed": String(!!v[key] === value), onclick: () => { send({[key]: value}); trigger(key); }}, text))));
function draw() {
  const presets = v.presets || [], chosen = presets.find(p => p.id === v.preset), most = (v.limits || {}).max_new_tokens || 1024;
  const active = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  swap(element, 
    h("section", {class: "side"}, h("h2", {}, "Preset"),
      h("select", {"aria-label": "preset", "data-key": "preset", onchange: e => {
        const id = e.target.value; if (id) alDraft.replacing(); send({preset: id}); if (id) trigger("preset", {id}); }},
        h("option", {value: "", selected: !chosen}, "Choose an experiment"),
        presets.map(p => h("option", {value: p.id, selected: p.id === v.preset}, p.title))),
      chosen ? h("p", {class: "soft"}, chosen.about) : null),
    h("section", {class: "side"}, h("h2", {}, "Decoding"),
      seg("mode", "mode", ["greedy", "sampled"]),
      v.mode === "sampled" ? [num("temperature", "temperature", 0.05, 5, 0.05), num("top_k", "top-k, 0 is off", 0, 1000, 1), num("top_p", "top-p", 0.01, 1, 0.01),
        num("seed", "seed", 0, 2147483647, 1), num("samples", "continuations", 1, (v.limits || {}).samples || 8, 1, null,
          "continuations of one prompt share its entries in memory, until a technique changes them")] : null,
      num("max_new_tokens", "new tokens", 1, most, 1),
      flag("chat", "prompt is", "text", "chat turn", "a chat turn is wrapped in the model's chat template"),
      flag("truncate", "too long", "refuse", "cut", "cut drops the prompt's first tokens until it fits the model's context")),
    h("section", {class: "side"}, h("h2", {}, "Timing"), seg("timing", "steps", ["interleaved", "clean"]),
      h("p", {class: "soft"}, v.timing === "clean" ? "One variant after another, each warmed up: the fairest times."
        : "All variants step by step beside each other; each step is timed alone.")));
  const again = active && element.querySelector(`[data-key="${CSS.escape(active)}"]`); if (again) again.focus();
}
draw(); tell(); watch("value", () => { v = Object.assign({}, props.value); tell(); draw(); });
