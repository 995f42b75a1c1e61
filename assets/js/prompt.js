/* The line above the prompt. value = {tokens, text}; tells the variant cards how long the prompt is. */
const draw = () => {
  const v = props.value || {};
  swap(element, h("div", {class: "h"}, "Prompt", v.text ? h("span", {class: v.over ? "num over" : "num"}, " · " + v.text) : null));
  window.alPromptTokens = v.tokens || null;
  dispatchEvent(new CustomEvent("al-prompt", {detail: {tokens: v.tokens || null}}));
};
// Until the model is there its tokens cannot be counted; ask again now and then.
setInterval(() => { if ((props.value || {}).waiting && !document.hidden) trigger("ready"); }, 4000);
document.addEventListener("keydown", e => { // Ctrl+Enter, or Command+Enter, runs what is written
  if (e.key !== "Enter" || !(e.ctrlKey || e.metaKey) || !e.target.closest || !e.target.closest("#prompt")) return;
  e.preventDefault(); const run = document.getElementById("run");
  if (run && !run.disabled) { e.target.dispatchEvent(new Event("input", {bubbles: true})); run.click(); }
});
draw(); watch("value", draw);
