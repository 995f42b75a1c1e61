/* What this page remembers of a run that has not ended. Loading the page again ends the run, and nobody can be asked before
   that (Gradio closes its stream first), so the prompt, the settings and the variants are given back afterwards. They lie in
   the session storage: another tab has its own.
   Kept: {prompt, settings, variants, page: the run in the address, run_id once it began}. */
window.alRun = (() => {
  const NAME = "attention-lab-run";
  const kept = () => { try { return JSON.parse(sessionStorage.getItem(NAME)); } catch { return null; } };
  const keep = what => { try { sessionStorage.setItem(NAME, JSON.stringify(what)); } catch {} };  // no storage, or it is full
  const page = () => new URL(location.href).searchParams.get("run");
  return {
    kept,
    forget: () => { try { sessionStorage.removeItem(NAME); } catch {} },
    pressed: (prompt, setup, settings) => {
      const {presets, limits, ...set} = settings || {};
      keep({prompt, settings: set, variants: (setup || {}).variants || [], page: page()});
      return [];
    },
    began: run_id => {
      const run = kept(); if (!run || run.run_id === run_id) return;
      keep({...run, page: null, run_id}); alDraft.ran({prompt: run.prompt, settings: run.settings, variants: run.variants});
    },
    // Unless the address names another run than it did, prompt, cards and settings are again what they were: what was set
    // last and not run, or what the run was made with.
    restored: (prompt, setup, settings) => {
      const run = kept(), typed = alDraft.arrived(prompt, setup, settings), mine = run && run.page === page();
      const same = mine && typed && alDraft.same(typed, {prompt: run.prompt, settings: run.settings, variants: run.variants});
      const is = typed && !same ? typed : mine ? run : null, left = run ? {left: run.run_id || "", set: is === run} : {};
      if (is && is !== run) alDraft.restored();
      if (is && is === run && run.run_id) alDraft.ran({prompt: run.prompt, settings: run.settings, variants: run.variants});
      return is ? [is.prompt, {...setup, variants: is.variants}, {...settings, ...is.settings}, left]
        : [prompt, setup, settings, left];
    },
  };
})();
