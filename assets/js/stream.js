/* The page's queue stream goes on while an answer is still due.

Gradio sends the answers of queued events over one stream, which the server ends with "close_stream" once nothing of the
visitor's is pending. Gradio's page then forgets the stream, even where it had joined another event since and waits for its
answers: where the stream is slower than the request (a proxy, a busy page), they never arrive and the pressed button does
nothing for good. So the message is passed on only while nothing is due; otherwise the stream is asked for again and goes on. */
(() => {
  const plain = window.fetch.bind(window), due = new Set(), over = new Set();
  let joining = 0, wake = () => {}, passing = Promise.resolve();
  const moment = () => new Promise(done => { wake = done; });

  const join = async (what, more) => {
    joining += 1;
    try {
      const reply = await plain(what, more);
      const told = await reply.clone().json().catch(() => ({}));
      if (told.event_id && !over.delete(told.event_id)) due.add(told.event_id);
      await passing;  // a stream that was just let go is forgotten before this event looks for one
      return reply;
    } finally { joining -= 1; wake(); }
  };

  const message = frame => {
    if (!/close_stream|process_completed/.test(frame.slice(0, 120))) return {};
    try { return JSON.parse(frame.replace(/^data: ?/, "")); } catch { return {}; }
  };

  const follow = async (what, more) => {
    const again = () => plain(what instanceof Request ? what.clone() : what, more);
    const first = await again();
    if (!first.ok || !first.body) return first;
    let reader = first.body.getReader();
    const pump = async out => {
      const read = new TextDecoder(), write = new TextEncoder();
      for (let held = ""; ;) {
        const {done, value} = await reader.read();
        if (done) break;
        held += read.decode(value, {stream: true});
        const frames = held.split("\n\n");
        held = frames.pop();
        for (const frame of frames) {
          const told = message(frame);
          if (told.msg === "process_completed" && !due.delete(told.event_id) && joining) over.add(told.event_id);
          if (told.msg === "close_stream") {
            while (joining) await moment();
            if (due.size) {
              const next = await again();
              if (next.ok && next.body) { reader = next.body.getReader(); held = ""; continue; }
            }
            due.clear(); over.clear();
            passing = new Promise(done => setTimeout(done, 50));
          }
          out.enqueue(write.encode(frame + "\n\n"));
        }
      }
      due.clear(); over.clear();  // a stream that broke off owes nothing
      out.close();
    };
    const body = new ReadableStream({
      start(out) { pump(out).catch(problem => { due.clear(); over.clear(); out.error(problem); }); },
      cancel(reason) { return reader.cancel(reason); },
    });
    return new Response(body, {status: first.status, headers: first.headers});
  };

  window.fetch = (what, more) => {
    const url = what instanceof Request ? what.url : String(what);
    return url.includes("/queue/join") ? join(what, more) : url.includes("/queue/data") ? follow(what, more) : plain(what, more);
  };
})();
