/* Runs beside each other, as lab/ui/components/comparison.py words them. Needs `ask`, `marked` and `open` from runs.js. */
let table = null, onlyDiff = true, find = "";
const comparison = h("section", {class: "comparison", "aria-label": "comparison", hidden: true});

async function compare() {
  const a = await server.compare(ask({ids: [...marked], only: onlyDiff})); if (a.error) { toast(a.error); return; }
  table = a; drawComparison(); comparison.hidden = false; comparison.scrollIntoView({block: "nearest"});
}
function foundGroups() { // those rows whose words hold what is looked for
  const word = find.toLowerCase(), fits = (g, r) => `${g.title} ${r.name} ${r.field}`.toLowerCase().includes(word);
  return table.groups.map(g => ({...g, rows: g.rows.filter(r => fits(g, r))})).filter(g => g.rows.length);
}
const runNames = () => table.run_ids.map((id, i) => table.names[i] || id);
function comparedText(groups) { // for a spreadsheet: a line a field, tabs between the runs
  const flat = text => text.replace(/\s+/g, " "), cell = ([text, times]) => flat(times ? `${text} (${times})` : text);
  return [["group", "field", ...runNames()], ...groups.flatMap(g => g.rows.map(r => [g.title, r.name, ...r.cells.map(cell)]))]
    .map(line => line.join("\t")).join("\n");
}
function drawComparison() {
  const groups = foundGroups();
  const which = [[true, "differences"], [false, "all fields"]];
  swap(comparison, h("div", {class: "row"}, h("span", {class: "h"}, `${table.run_ids.length} runs compared`),
    h("input", {type: "search", placeholder: "Field", "aria-label": "search fields", "data-key": "fields", value: find,
      oninput: e => { find = e.target.value; drawComparison(); }}),
    h("span", {class: "seg small", role: "group", "aria-label": "which fields"}, which.map(([v, t]) =>
      h("button", {type: "button", "aria-pressed": String(onlyDiff === v), onclick: () => { onlyDiff = v; compare(); }}, t))),
    h("span", {class: "sp"}),
    h("button", {type: "button", class: "quiet", onclick: e => copy(comparedText(groups), e.target)}, "Copy table"),
    h("button", {type: "button", class: "quiet", onclick: () => { comparison.hidden = true; }}, "Close")),
    groups.length ? [h("p", {class: "soft note"}, "A number with × is the multiple of the first run's."),
      h("div", {class: "tablebox"}, h("table", {class: "lines cmp", style: `--runs: ${table.run_ids.length}`},
        comparisonHead(), groups.map(comparisonGroup)))]
      : h("p", {class: "soft"}, find ? "No field matches." : "These runs agree in every field."));
}
const comparisonHead = () => h("thead", {}, h("tr", {}, h("th", {scope: "col"}, "field"), runNames().map((name, i) =>
  h("th", {scope: "col"}, h("button", {type: "button", class: "link", onclick: () => open(table.run_ids[i])}, name)))));
function comparisonGroup(g) {
  const cell = ([text, times]) => h("td", {}, h("div", {class: "cell", title: text.length > 160 ? text : null}, text),
    times ? h("small", {class: "num soft"}, times) : null);
  return h("tbody", {}, h("tr", {class: "group"}, h("th", {scope: "rowgroup", colspan: table.run_ids.length + 1}, g.title)),
    g.rows.map(r => h("tr", {class: r.differs ? "differs" : ""}, h("th", {scope: "row", title: r.field}, r.name),
      r.cells.map(cell))));
}
