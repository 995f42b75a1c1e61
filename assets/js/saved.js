/* The line under the results. value = {run_id, name, example, problem}; server.rename, server.export */
const draw = () => {
  const v = props.value || {};
  if (v.run_id && !v.example) address({run: v.run_id});
  if (!v.run_id) { element.replaceChildren(); return; }
  const save = async format => { const file = await server.export({run_id: v.run_id, format, owner: owner()});
    file.error ? toast(file.error) : download(file); };
  const held = element.contains(document.activeElement) && document.activeElement.dataset.key;
  swap(element, h("div", {class: "savedline row"},
    v.example ? null : v.problem ? h("span", {class: "why", role: "alert"}, v.problem) : [h("label", {class: "h", for: "al-runname"}, "Saved as"),
      h("input", {id: "al-runname", "data-key": `name-${v.run_id}`, type: "text", maxlength: 120, value: v.name || "", placeholder: v.run_id, onchange: async e => {
        const done = await server.rename({run_id: v.run_id, name: e.target.value, owner: owner()});
        toast(done.error || "Renamed."); if (!done.error) trigger("renamed"); dispatchEvent(new Event("al-runs")); }})],
    h("span", {class: "sp"}),
    v.example ? null : [h("button", {type: "button", class: "quiet", "data-key": "copy", onclick: e => copy(location.href, e.currentTarget)}, "Copy link"),
      ["json", "csv", "parquet"].map(f => h("button", {type: "button", class: "quiet", "data-key": `export-${f}`, onclick: () => save(f)}, "Export " + ({json: "JSON", csv: "CSV", parquet: "Parquet"})[f]))],
    h("button", {type: "button", class: "quiet", "data-key": "map", onclick: () => { const t = document.querySelector('[role=tab][data-tab-id="attention"]'); if (t) t.click(); }}, "Open the attention map →")));
  const again = held && element.querySelector(`[data-key="${CSS.escape(held)}"]`); if (again) again.focus();
};
draw(); watch("value", () => { draw(); dispatchEvent(new Event("al-runs")); });
