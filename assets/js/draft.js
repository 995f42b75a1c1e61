/* What was set in Compare and not run: prompt, settings and variants. Loading the page again gives it back, and so does a
   button where a preset or an opened run took its place. It lies in the session storage: another browser tab has its own.
   A state is {prompt, settings, variants}; `base` is what the server set last, `lost` what can be brought back, `before` what
   stood, and could be, when something else was asked for. */
window.alDraft = (() => {
  const NAME = "attention-lab-draft", LISTS = ["presets", "limits"];
  let base = null, lost = null, before = null, elsewhere = false; // elsewhere: what is kept is another page's, and stays
  const lines = prompt => (prompt || "").replace(/\r\n?/g, "\n"); // as the field has them
  const state = (prompt, setup, settings) => ({prompt: lines(prompt), variants: (setup || {}).variants || [],
    settings: Object.fromEntries(Object.entries(settings || {}).filter(([key]) => !LISTS.includes(key)))});
  const now = () => {
    const field = document.querySelector("#prompt textarea");
    return field && state(field.value, {variants: window.alVariants}, window.alSettings);
  };
  const text = x => JSON.stringify(x, (key, v) => key === "preset" ? undefined // only the name of what the rest says
    : v && typeof v === "object" && !Array.isArray(v) ? Object.fromEntries(Object.entries(v).sort()) : v);
  const same = (a, b) => text(a) === text(b);
  const page = () => new URL(location.href).searchParams.get("run");
  const own = () => { const is = base && now(); return is && !same(is, base) ? is : null; };
  const tell = (text, name) => dispatchEvent(new CustomEvent("al-draft", {detail: {text, name}}));
  const keep = () => {
    try {
      const is = base && own();
      if (is) sessionStorage.setItem(NAME, JSON.stringify({...is, page: page()}));
      else if (base && !elsewhere) sessionStorage.removeItem(NAME);
    } catch {}  // no storage, or it is full
  };
  addEventListener("pagehide", () => { // a number that is still being typed counts
    const field = document.activeElement; if (field && field.closest("#setup, #settings")) field.blur();
    keep();
  });
  document.addEventListener("visibilitychange", () => { if (document.hidden) keep(); });
  return {
    same,
    // The page arrived with these values: what was set before it was loaded again, or null. A page of another run is no place
    // for it.
    arrived: (...values) => {
      base = state(...values);
      try {
        const {page: where, ...kept} = JSON.parse(sessionStorage.getItem(NAME)) || {};
        const whole = typeof kept.prompt === "string" && kept.variants.every(v => Array.isArray(v.techniques));
        elsewhere = whole && where !== page();
        return whole && !elsewhere && !same(kept, base) ? kept : null;
      } catch { return null; }
    },
    restored: () => { lost = base; tell("What you had set and not run yet is set again.", "Discard it"); },
    replacing: () => { before = {is: now(), lost}; lost = own() || lost; }, // called before something takes its place
    replaced: (what, ...values) => {
      const is = state(...values);
      if (before && same(before.is, is)) { lost = before.lost; return []; } // it was refused: what was set still stands
      base = is;
      if (lost && same(lost, is)) lost = null;
      if (lost) tell(`${what} took the place of what you had set.`, "Bring it back"); else tell();
      return [];
    },
    ran: is => { base = {...base, ...is}; lost = null; tell(); },
    dropped: () => { lost = null; },
    back: (prompt, setup, settings) => {
      const is = lost; lost = null; tell();
      return is ? [is.prompt, {...setup, variants: is.variants}, {...settings, ...is.settings}]
        : [prompt, setup, settings];
    },
  };
})();
