/* The Attention tab. value = {key, rev, example, variants: [{letter, title, layers, layers_total, heads, kv_heads, tokens, prompt}], sel} */
const S = {key: null, letter: null, minus: null, limit: null, fork: null, layer: null, head: 0, pool: "max", log: true, pin: null, cursor: null, row: 0, now: null, tokens: [], seen: null, tried: new Set(), failed: new Set(),
  ask: () => ({key: S.key, letter: S.letter, minus: S.minus, layer: S.layer, head: S.head}),
  drawn: () => { note(); }, moved: () => { note(); drawCache(); }, recolour: () => { paintCache(); gridRecolour(); },
  point: (row, col) => { S.cursor = {row, col}; draw(); if (row !== S.row) { S.row = row; rowChanged(row, true); } },
  setPin: (at, reveal) => { S.pin = at ? {row: at.row, col: at.col} : null; if (at) { S.cursor = null; S.row = at.row; rowChanged(at.row, true); tellLife(at.col); if (reveal) show(at.row, at.col); } draw(); note(); },
  chooseRow: (i, reveal) => { const col = (S.pin || S.cursor || {col: i}).col; S.setPin({row: i, col: Math.min(col, i)}, reveal); },
  trouble: t => { const name = `${S.key}/${S.letter}/${S.layer}`, replay = () => { say(`Replaying variant ${S.letter} to capture its attention…`); trigger("replay", S.ask()); };
    if (t.auto && !S.failed.has(name)) { if (S.tried.has(name)) say(`Replaying variant ${S.letter} to capture its attention\u2026`); else { S.tried.add(name); replay(); } }
    else { say(null); cover.hidden = false; swap(cover, h("p", {}, t.error), h("div", {class: "row center"},
      (S.now.layers || []).slice(0, 12).map(l => h("button", {type: "button", class: "plain", onclick: () => S.choose({layer: l})}, `Show layer ${l}`)),
      t.replay ? h("button", {type: "button", class: "plain", onclick: replay}, `Replay to capture layer ${S.layer}`) : null)); }
    bars.replaceChildren(); figures.replaceChildren(); },
  choose: changes => { Object.assign(S, changes); if (S.minus === S.letter) S.minus = null; address({variant: S.letter, minus: S.minus, layer: S.layer, head: S.head}); load(); },
};
