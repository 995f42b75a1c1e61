/* Saved runs. server: listing, rename, tag, share, delete, restore, compare, export, take. Triggers 'open' {run_id}. */
let rows = [], query = "", marked = new Set(), editing = null, notice = "", loaded = false;
let heir = null, gone = []; // where the focus goes when its place is drawn away; what the Undo in sight brings back
const ask = extra => ({owner: owner(), ...extra});
const search = h("input", {type: "search", placeholder: "Name, prompt, technique, model, #tag", "aria-label": "search runs", "data-key": "search", oninput: e => { query = e.target.value; list(); }});
const file = h("input", {type: "file", accept: ".json,.parquet", class: "sr", tabindex: "-1", "aria-hidden": "true", onchange: async e => {
  const f = e.target.files[0]; e.target.value = ""; if (!f) return; toast(`Importing ${f.name}`);
  const data = await new Promise(done => { const r = new FileReader(); r.onload = () => done(String(r.result).split(",")[1] || ""); r.readAsDataURL(f); });
  const a = await server.take(ask({name: f.name, data})); toast(a.error || imported(a)); load(); }});
const imported = a => a.added ? a.there ? `Imported ${a.added}; ${a.there} of the file's runs were here already.` : "Imported."
  : a.there > 1 ? "These runs are here already. Nothing was changed." : "This run is here already. Nothing was changed.";
const body = h("div");
const cmpbutton = h("button", {type: "button", class: "plain", disabled: true, onclick: () => compare()}, "Compare");
swap(element, h("div", {class: "row runsbar"}, search, h("span", {class: "sp"}), cmpbutton,
  h("button", {type: "button", class: "plain", onclick: () => file.click()}, "Import"), file), body, comparison);

let asked = 0;
async function load() { // of several answers under way only the newest counts
  const mine = ++asked, a = await server.listing(ask()).catch(() => ({error: "The server did not answer. Reload the page."}));
  if (mine !== asked) return;
  loaded = true; if (a.error) { swap(body, h("p", {class: "why", role: "alert"}, a.error)); return; }
  rows = a.rows; notice = a.note || ""; marked = new Set([...marked].filter(id => rows.some(r => r.run_id === id))); list();
}
const matches = r => query.toLowerCase().split(/\s+/).filter(Boolean).every(w => w[0] === "#" ? r.tags.some(t => t.toLowerCase().startsWith(w.slice(1)))
  : [r.run_id, r.name, r.model, r.prompt, ...r.tags, ...r.titles, ...r.specs].join(" ").toLowerCase().includes(w));
function mark(id, on) { if (on && marked.size >= 10) { toast("Ten runs is the most that can be compared."); list(); return; } on ? marked.add(id) : marked.delete(id); if (later.has(body)) list(); else buttons(); }
function buttons() { cmpbutton.disabled = marked.size < 2; cmpbutton.textContent = marked.size < 2 ? "Compare" : `Compare ${marked.size} runs`; }
const GOING = "being generated", going = id => rows.some(r => r.run_id === id && r.status === GOING);
const open = id => {
  if (going(id)) { toast("This run is still being generated. Open it once it has ended."); load(); return; }
  if (document.querySelector("#run:disabled")) { // its columns would be written under the other run's prompt
    toast("Your own run is under way. Stop it, or open this one once it has ended."); return; }
  alDraft.replacing(); alPlace.left(); trigger("open", {run_id: id, owner: owner()});
};
function list() {
  const typing = body.querySelector(".editing"); // news that arrives while somebody types waits until they are done
  if (editing && typing && typing.dataset.edit === `${editing.id}/${editing.kind}`) return;
  const shown = rows.filter(matches), held = element.contains(document.activeElement) && document.activeElement.dataset.key; buttons();
  if (!rows.length) { swap(body, notice ? h("p", {class: "banner"}, notice) : null, h("div", {class: "empty"}, h("p", {}, "No saved runs yet. Every run is saved here when it ends."),
    h("button", {type: "button", onclick: () => { const t = document.querySelector('[role=tab][data-tab-id="compare"]'); if (t) t.click(); }}, "Make a run"))); settle(held); return; }
  swap(body, notice ? h("p", {class: "banner"}, notice) : null, h("div", {class: "tablebox"}, h("table", {class: "lines runs"}, h("caption", {class: "sr"}, "saved runs"), h("thead", {}, h("tr", {},
    ["", "run", "variants", "prompt", "worst KL", "smallest KV", "tags", ""].map(t => h("th", {scope: "col", title: {
      "worst KL": "the largest mean KL(reference‖variant) of the run's variants, in nats per token; 0 is the same beliefs",
      "smallest KV": "the smallest cache of the run's variants, as a share of the dense cache's bytes"}[t] || null}, t)))), h("tbody", {}, shown.map(row)))),
    shown.length ? null : h("p", {class: "soft"}, "No run matches. ", h("button", {type: "button", class: "quiet", onclick: () => { query = search.value = ""; list(); }}, "Clear the search")));
  const input = editing && body.querySelector(".editing");
  if (input) { input.focus(); input.select(); return; }
  settle(held);
}
function settle(held) { // the focus stays, or goes to its heir
  const next = [held, heir].map(key => key && element.querySelector(`[data-key="${CSS.escape(key)}"]`)).find(Boolean);
  if (next && (held || document.activeElement === document.body)) next.focus();
  heir = null;
}
function field(r, kind, value, done) {
  return h("input", {type: "text", class: "editing", "data-edit": `${r.run_id}/${kind}`, maxlength: 200, value, "aria-label": `${kind} of ${r.run_id}`,
    onkeydown: e => { if (e.key === "Enter" || e.key === "Escape") heir = `${kind}-${r.run_id}`;
      if (e.key === "Enter") e.target.blur(); if (e.key === "Escape") { editing = null; e.target.blur(); list(); } },
    onblur: async e => { if (!editing) return; editing = null; if (e.target.value !== value) { const a = await done(e.target.value); if (a && a.error) toast(a.error); else if (kind === "name") trigger("renamed"); } load(); }});
}
function row(r) {
  const is = kind => editing && editing.id === r.run_id && editing.kind === kind, edit = kind => { editing = {id: r.run_id, kind}; list(); };
  return h("tr", {class: (props.value || {}).current === r.run_id ? "on" : ""},
    h("td", {}, h("input", {type: "checkbox", "aria-label": `choose ${r.name || r.run_id} for comparison`, "data-key": `mark-${r.run_id}`, checked: marked.has(r.run_id), onchange: e => mark(r.run_id, e.target.checked)})),
    h("td", {class: "runname"}, is("name") ? field(r, "name", r.name, name => server.rename(ask({run_id: r.run_id, name})))
      : h("button", {type: "button", class: "link", "data-key": `run-${r.run_id}`, onclick: () => open(r.run_id)}, r.name || r.run_id),
      h("small", {class: "soft"}, [r.when, r.model, r.status === "complete" ? "" : r.status].filter(Boolean).join(" · "), r.shared ? [" · shared ", h("button", {type: "button", class: "quiet", "aria-label": `stop sharing ${r.name || r.run_id}`, onclick: () => unshare(r)}, "stop")] : null)),
    h("td", {class: "variants"}, r.titles.map((t, i) => h("span", {title: r.specs[i]}, h("span", {class: `dot v${"ABCDEFGH"[i]}`}),
      r.titles.indexOf(t) === r.titles.lastIndexOf(t) ? t : r.specs[i]))), // two of one title are told by their specifications
    h("td", {class: "prompt"}, h("div", {title: r.prompt}, r.prompt)), h("td", {class: "num", "data-name": "worst KL"}, r.kl_text), h("td", {class: "num", "data-name": "smallest KV"}, r.kv_text),
    h("td", {class: "tags"}, is("tags") ? field(r, "tags", r.tags.join(", "), text => server.tag(ask({run_id: r.run_id, tags: text.split(",").map(t => t.trim()).filter(Boolean)})))
      : [r.tags.map(t => h("button", {type: "button", class: "chip pick", onclick: () => { query = search.value = "#" + t; list(); }}, t)), h("button", {type: "button", class: "quiet", "aria-label": `edit tags of ${r.name || r.run_id}`, "data-key": `tags-${r.run_id}`, onclick: () => edit("tags")}, r.tags.length ? "edit" : "+ tag")]),
    h("td", {class: "acts"}, h("button", {type: "button", class: "quiet", "data-key": `open-${r.run_id}`, onclick: () => open(r.run_id)}, "Open"),
      h("button", {type: "button", class: "quiet", "data-key": `name-${r.run_id}`, onclick: () => edit("name")}, "Rename"),
      h("button", {type: "button", class: "quiet", title: "Copy a link to this run", "data-key": `share-${r.run_id}`, "aria-label": `share ${r.name || r.run_id}`, onclick: e => share(r, e.target)}, "Share"),
      h("select", {"aria-label": `export ${r.name || r.run_id}`, "data-key": `export-${r.run_id}`, onchange: async e => { const format = e.target.value; e.target.selectedIndex = 0; if (!format) return;
        const a = await server.export(ask({run_id: r.run_id, format})); a.error ? toast(a.error) : download(a); }},
        h("option", {value: ""}, "Export"), h("option", {value: "json"}, "JSON"), h("option", {value: "csv"}, "CSV"), h("option", {value: "parquet"}, "Parquet")),
      h("button", {type: "button", class: "quiet", "data-key": `delete-${r.run_id}`, "aria-label": `delete ${r.name || r.run_id}`,
        onclick: e => remove(r, !e.detail)}, "Delete")));
}
const forget = debounce(() => { gone = []; }, ACTION_MS);
async function remove(r, byKey) { // one Undo brings back whatever was deleted while it stood there
  const a = await server.delete(ask({run_id: r.run_id})); if (a.error) { toast(a.error); return; }
  const shown = rows.filter(matches), at = shown.findIndex(x => x.run_id === r.run_id), near = shown[at + 1] || shown[at - 1];
  const next = near ? `delete-${near.run_id}` : "search";
  gone.push(r); forget(); heir = next; await load();
  const box = toast(gone.length > 1 ? `Deleted ${gone.length} runs.` : `Deleted ${r.name || r.run_id}.`, "Undo", async () => {
    const back = gone; gone = []; heir = `delete-${r.run_id}`;
    for (const x of back) { const b = await server.restore(ask({run_id: x.run_id})); if (b.error) toast(b.error); }
    load();
  });
  if (!byKey) return; // a key led here: Undo is the next thing in reach, and Escape goes on in the table
  const button = box.querySelector("button"); button.focus();
  button.addEventListener("keydown", e => { if (e.key === "Escape") { box.remove(); heir = next; list(); } });
}
const linkTo = r => { const u = new URL(location.origin + location.pathname); u.searchParams.set("run", r.run_id); return u.href; };
async function share(r, button) {
  const a = await server.share(ask({run_id: r.run_id, shared: true})); if (a.error) { toast(a.error); return; }
  await copy(linkTo(r), button); toast(a.public ? "Link copied. Whoever has it can open this run." : "Link copied. It opens this run for whoever can reach this machine.");
  load();
}
async function unshare(r) { const a = await server.share(ask({run_id: r.run_id, shared: false})); if (a.error) toast(a.error); else toast("No longer shared."); load(); }
load(); watch("value", () => list());
addEventListener("al-runs", () => load());
document.addEventListener("click", e => { const t = e.target.closest && e.target.closest('[role=tab]'); if (t && /runs/i.test(t.textContent)) load(); });
