/* The Attention tab. value = {key, rev, example, variants: [{letter, title, layers, layers_total, heads, kv_heads, tokens,
   prompt, fork}], sel}. State `S`, and what the pieces (map, panels, cachemap, grid, tokens, attention_shell) tell each other. */
const LOST = "The server did not answer. Reload the page.";
const S = {
  value: {}, key: null, letter: null, minus: null, limit: null, fork: null, layer: null, over: null, head: 0, pool: "max", log: true,
  pin: null, cursor: null, want: null, shown: null, got: null, rev: null, waiting: null, row: 0, now: null, tokens: [],
  seen: null, tried: new Set(), failed: new Map(),
  ask: () => ({key: S.key, letter: S.letter, minus: S.minus, layer: S.layer, over: S.over, head: S.head}),
  whole: () => S.head === "rollout" || S.over !== null,
  drawn: () => { note(); },
  moved: () => { note(); drawCache(); },
  recolour: () => { paintCache(); gridRecolour(); },
  point: (row, col) => { S.cursor = {row, col}; draw(); if (row !== S.row) { S.row = row; rowChanged(row, true); } },
  setPin: (at, reveal, life, home) => { // `home`: the box that the token was chosen in; its life is told there
    S.pin = at ? {row: at.row, col: at.col} : null;
    if (at) {
      S.cursor = null; S.row = at.row; rowChanged(at.row, true); tellLife(life === undefined ? at.col : life, home || beside());
      if (reveal) show(at.row, at.col);
    } else if (!cachebox.contains(lifebox)) forgetLife();
    dispatchEvent(new CustomEvent("al-pin", {detail: at ? at.row : null}));
    draw(); note(); tellPin();
  },
  chooseRow: (i, reveal, home) => { // a token of the text: it becomes the row, and its own life is told
    const col = (S.pin || S.cursor || {col: i}).col;
    S.setPin({row: i, col: Math.min(col, i)}, reveal, i, home);
  },
  name: () => `${S.key}/${S.letter}/${S.layer}`, // of a replay: which were asked for by themselves, and what ended others
  replay: () => { S.failed.delete(S.name()); S.wait(); trigger("replay", S.ask()); },
  replaying: () => !!S.waiting && S.waiting.key === S.key && S.waiting.letter === S.letter,
  waits: () => `Waits for the replay of variant ${S.letter}.`, // said by what needs the captured attention
  wait: async () => { // while a variant is replayed the cover says how far it is
    const {key, letter} = S, mine = S.waiting = {key, letter}, words = `Replaying variant ${letter} to capture its attention…`;
    say(words); busy(true); swap(bars, h("p", {class: "soft"}, S.waits())); gridDraw();
    while (S.waiting === mine && S.key === key && S.letter === letter) {
      await new Promise(done => setTimeout(done, 700));
      const a = await server.replays({key, letter}).catch(() => null);
      if (S.waiting !== mine || S.key !== key || S.letter !== letter || !a || a.fraction === undefined) return;
      if (a.fraction === null) {
        swap(cover, h("p", {}, a.after ? `Variant ${letter} waits for the replay of variant ${a.after}.` : words)); continue;
      }
      swap(cover, h("p", {}, `${words} ${Math.round(a.fraction * 100)}%`), h("div", {class: "row center"}, h("button",
        {type: "button", class: "plain", onclick: () => server.replays({key, letter, drop: true}).catch(() => null)}, "Cancel")));
    }
  },
  trouble: t => {
    drawing = null; busy(false);
    const name = S.name();
    if (t.auto && !S.failed.has(name)) {
      if (S.tried.has(name)) S.wait(); else { S.tried.add(name); S.replay(); }
    } else {
      const offered = (S.now.layers || []).slice(0, 12).map(l =>
        h("button", {type: "button", class: "plain", onclick: () => S.choose({layer: l, over: null})}, `Show layer ${l}`));
      say(null); cover.hidden = false;
      swap(cover, h("p", {}, t.replay && S.failed.has(name) ? `Variant ${S.letter} could not be replayed. ${S.failed.get(name)}`
        : t.error), h("div", {class: "row center"}, offered,
        t.replay ? h("button", {type: "button", class: "plain", onclick: S.replay}, `Replay to capture layer ${S.layer}`)
          : null));
    }
    if (!S.replaying()) bars.replaceChildren();
    figures.replaceChildren();
  },
  address: () => address({variant: S.letter, minus: S.minus, layer: S.over || S.layer, head: S.head}),
  choose: changes => {
    Object.assign(S, changes); if (S.minus === S.letter) S.minus = null;
    toldbox.replaceChildren(); S.address(); load();
  },
};
