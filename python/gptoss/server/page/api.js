// The server's HTTP API, as far as the page needs it. Addresses are relative: the page works below any path of a reverse proxy.

/** What the server answered, or why it could not be asked. `status` is 0 for the latter. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The name of the server's model. */
export async function modelName(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data[0].id;
}

/**
 * One answer, streamed. Yields {reasoning} and {content} pieces, {finish} and {usage}.
 * Aborting `signal` closes the connection, on which the server stops computing.
 */
export async function* chat(body, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 200);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.reasoning) yield { reasoning: choice.delta.reasoning };
    if (choice?.delta?.content) yield { content: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  throw new ApiError("The connection ended before the answer did.", 0);
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it running?", 0);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ApiError(answer?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`, response.status);
}

/** The data of each event: text between "data:" and an empty line. Comments (keep-alives) are left out. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke off.", 0);
      }
      if (part.done) return;
      const events = (held + part.value).replaceAll("\r\n", "\n").split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
