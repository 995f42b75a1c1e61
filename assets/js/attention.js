/* The Attention tab. value = {key, rev, example, variants: [{letter, title, layers, layers_total, heads, kv_heads, tokens, prompt}], sel} */
const S = {key: null, letter: null, layer: null, head: 0, pool: "max", log: true, pin: null, cursor: null, row: 0, now: null, tokens: [], seen: null,
  ask: () => ({key: S.key, letter: S.letter, layer: S.layer, head: S.head}),
  drawn: () => { note(); }, moved: () => { note(); drawCache(); }, recolour: () => { paintCache(); },
  point: (row, col) => { S.cursor = {row, col}; draw(); if (row !== S.row) { S.row = row; rowChanged(row, true); } },
  setPin: (at, reveal) => { S.pin = at ? {row: at.row, col: at.col} : null; if (at) { S.cursor = null; S.row = at.row; rowChanged(at.row, true); tellLife(at.col); if (reveal) show(at.row, at.col); } draw(); note(); },
  chooseRow: (i, reveal) => { const col = (S.pin || S.cursor || {col: i}).col; S.setPin({row: i, col: Math.min(col, i)}, reveal); },
  trouble: t => { say(null); cover.hidden = false; swap(cover, h("p", {}, t.error), h("div", {class: "row center"},
    (S.now.layers || []).slice(0, 12).map(l => h("button", {type: "button", class: "plain", onclick: () => S.choose({layer: l})}, `Show layer ${l}`)),
    t.replay ? h("button", {type: "button", class: "plain", onclick: () => trigger("replay", {key: S.key, letter: S.letter, layer: S.layer})}, `Replay to capture layer ${S.layer}`) : null));
    bars.replaceChildren(); figures.replaceChildren(); },
  choose: changes => { Object.assign(S, changes); address({variant: S.letter, layer: S.layer, head: S.head}); load(); },
};
