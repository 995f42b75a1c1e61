/* Tells of a run that was going on when the page was loaded again. value = {run_id: the run that began} | {over: true} |
   {left: run_id, or "" for one that never began, set: whether its prompt and settings are in sight}.
   server.state({run_id, owner}) answers {state}. Triggers 'open' {run_id, owner}. Below it, what was set and not run, and where
   it went: triggers 'back', which sets what draft.js holds. */
const SET = " Its prompt, settings and variants are set again.";
const SAYS = {
  going: "Your run is still going. It can be opened as soon as it has ended.",
  interrupted: "Your run was interrupted when the page was loaded again. What it had written is kept.",
  ended: "Your run has ended and is kept.",
  none: "Your run was interrupted when the page was loaded again, before anything of it was kept.",
};
const runbox = h("div"), draftbox = h("div");
element.replaceChildren(runbox, draftbox);
const notice = (key, text, name, does, close) => h("div", {class: "banner row unfinished", role: "status"}, h("span", {}, text),
  does ? h("button", {type: "button", class: "plain", "data-key": key, onclick: does}, name) : null,
  h("button", {type: "button", class: "quiet", "data-key": "close", "aria-label": "close this message", onclick: close}, "×"));
let told = 0;
function tell(state, v) {
  const text = SAYS[state] + (v.set ? SET : ""), close = () => { told++; alRun.forget(); runbox.replaceChildren(); };
  const open = state === "interrupted" || state === "ended"
    ? () => { close(); alDraft.replacing(); alPlace.left(); trigger("open", {run_id: v.left, owner: owner()}); } : null;
  swap(runbox, notice("open", text, "Open it", open, close));
  if (!element.offsetParent) toast(text, open && "Open it", open); // another tab of the page is in sight
}
async function follow(v) { // a run that was just left ends within a step; one in another tab goes on
  const mine = ++told;
  if (!v.left) return tell("none", v);
  for (let before = null; mine === told;) {
    const a = await server.state({run_id: v.left, owner: owner()}).catch(() => null);
    if (mine !== told) return;
    if (a && a.state !== before) tell(before = a.state, v);
    if (a && a.state !== "going") return;
    await new Promise(done => setTimeout(done, 1000));
  }
}
function draw() {
  const v = props.value || {};
  if (v.left !== undefined) { follow(v); return; }
  told++; runbox.replaceChildren();
  if (v.run_id) { alRun.began(v.run_id); address({run: null}); } // the results in sight are no longer those of the run before
  if (v.over) alRun.forget();
}
addEventListener("al-draft", e => {
  const {text, name} = e.detail || {};
  const close = () => { alDraft.dropped(); draftbox.replaceChildren(); };
  swap(draftbox, text ? notice("back", text, name, () => trigger("back"), close) : []);
});
draw(); watch("value", draw);
