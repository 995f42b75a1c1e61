/* The list of diagnostics. value = {key, variants, total, list, chosen, letter, fraction, problem, done, words}. Triggers 'compute' or 'probe'. */
const D = {key: null, name: null, letter: null, words: "", asked: false};
const wordbox = h("input", {type: "text", maxlength: 200, placeholder: "words that matter, as in the prompt", "aria-label": "words that matter", oninput: e => { D.words = e.target.value; }});
function draw() {
  const v = props.value || {}, focus = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  if (D.key !== v.key) { D.key = v.key; D.asked = false; if (!(v.variants || []).some(x => x.letter === D.letter)) D.letter = v.variants && v.variants.length ? v.variants[0].letter : null; }
  if (v.chosen && D.name === null) D.name = v.chosen;
  if (v.fraction === undefined) D.asked = false;
  if (!v.key) { swap(element); return; }
  const d = v.list.find(x => x.name === D.name), running = D.asked || v.fraction !== undefined, variant = v.variants.find(x => x.letter === D.letter);
  swap(element, h("section", {class: "gridbox", "aria-label": "diagnostics"}, h("div", {class: "row"}, h("span", {class: "h"}, "Diagnostics of the literature"),
    v.variants.length > 1 ? h("span", {class: "seg small", role: "group", "aria-label": "variant to look at"}, v.variants.map(x => h("button", {type: "button", title: x.title, "data-key": `d-${x.letter}`, "aria-pressed": String(x.letter === D.letter), onclick: () => { D.letter = x.letter; draw(); }}, x.letter))) : null),
    h("div", {class: "chips probelist"}, v.list.map(x => h("button", {type: "button", class: "chip", "data-key": `p-${x.name}`, "aria-pressed": String(x.name === D.name), title: x.model ? "needs the model" : "reads the run alone", onclick: () => { D.name = D.name === x.name ? null : x.name; draw(); }}, x.title))),
    d ? h("div", {class: "probe"}, h("p", {}, d.help), h("p", {class: "soft"}, d.explanation), h("p", {class: "soft note"}, h("a", {href: `https://arxiv.org/abs/${d.arxiv}`, target: "_blank", rel: "noopener noreferrer"}, d.paper), ` · ${d.year}`,
        d.model ? " · feeds the run through the loaded model again" : "", d.captures && variant && variant.layers.length && v.total && variant.layers.length < v.total ? ` · captured layers only: ${variant.layers.join(", ")} of ${v.total}` : ""),
      h("div", {class: "row"}, d.words ? wordbox : null, running ? [h("progress", {max: 1, value: v.fraction || 0, "aria-label": "progress"}), h("span", {class: "num"}, `${Math.round((v.fraction || 0) * 100)}%`), h("button", {type: "button", class: "quiet", "data-key": "d-stop", onclick: () => server.stop({key: v.key}).catch(() => null)}, "Cancel")]
        : h("button", {type: "button", class: "plain", "data-key": "d-run", onclick: () => { D.asked = true; trigger(d.model ? "probe" : "compute", {key: v.key, letter: D.letter, name: d.name, words: d.words ? D.words : ""}); draw(); }}, `Run on ${D.letter}`)),
      v.problem && v.chosen === d.name ? h("p", {class: "why", role: "alert"}, v.problem) : null) : null,
    v.done ? h("p", {class: "soft note", role: "status"}, `Below: ${(v.list.find(x => x.name === v.done) || {}).title} of ${v.letter}.`) : null));
  if (focus) { const node = element.querySelector(`[data-key="${CSS.escape(focus)}"]`) || element.querySelector('[data-key="d-run"], [data-key="d-stop"]'); if (node) node.focus(); }
}
draw(); watch("value", draw);
