// The rollout reader: filters, a list that grows on request, and each rollout's tokens with colour and loss mask.
const PAGE = 25;
const TAG = /<(\/?)(think|search|information|answer)>/g;
const reader = { matching: [], shown: 0, list: null, count: null, more: null, view: null };

function promptOf(rollout) {
  const [before, after] = data.prompts[rollout.prompt];
  return rollout.prompt_has_question ? before + rollout.question + after : before;
}

// [{start, end, kind}] over the characters of a text: an opening tag begins its kind, the closing one ends it.
function segmentsOf(text, outside) {
  const found = [...text.matchAll(TAG)];
  const segments = [];
  let kind = found.length && found[0][1] && outside === "plain" ? found[0][2] : outside;
  let start = 0;
  for (const match of found) {
    const cut = match[1] ? match.index + match[0].length : match.index;
    if (cut > start) segments.push({ start, end: cut, kind });
    start = cut;
    kind = match[1] ? outside : match[2];
  }
  if (start < text.length) segments.push({ start, end: text.length, kind });
  return segments;
}

// [{text, known}] of each token. `lengths` counts characters as Python does: code points, not UTF-16 units.
function tokensOf(text, lengths) {
  if (!lengths) return [{ text, known: false }];
  const characters = [...text];
  let start = 0;
  return [...lengths].map((length) => {
    const end = start + length.codePointAt(0) - 48;
    const token = { text: characters.slice(start, end).join(""), known: true };
    start = end;
    return token;
  });
}

// Spans for a text: each token one span, cut where the colour changes.
function words(text, lengths, outside, inLoss, place) {
  const segments = segmentsOf(text, outside);
  const spans = [];
  const mask = inLoss ? "in-loss" : "no-loss";
  let at = 0;
  let segment = 0;
  for (const token of tokensOf(text, lengths)) {
    if (token.known) place.token += 1;
    const title = token.known ? `token ${place.token}, ${inLoss ? "in the loss" : "not in the loss"}` : "tokens not told apart";
    const span = make("span", { class: `token ${mask}`, title });
    if (token.known) span.dataset.token = String(place.token);
    if (!token.text) {
      span.classList.add("empty", "plain");
      span.title += ": no text of its own (a special token, or part of a character)";
    }
    const end = at + token.text.length;
    while (at < end) {
      while (segments[segment].end <= at) segment += 1;
      const cut = Math.min(end, segments[segment].end);
      span.append(make("span", { class: segments[segment].kind }, text.slice(at, cut)));
      at = cut;
    }
    spans.push(span);
  }
  return spans;
}

function viewClasses() {
  return `words${reader.view.mask.checked ? " by-mask" : ""}${reader.view.tokens.checked ? " by-token" : ""}`;
}

function describeTurn(turn, index) {
  const search = turn.search;
  const parts = [`Turn ${index + 1}: ${turn.action || "turn"}`];
  if (turn.reason) parts.push(turn.reason);
  if (turn.tokens !== null && turn.tokens !== undefined) parts.push(`${turn.tokens} tokens`);
  if (turn.finish) parts.push(`ended by ${turn.finish}`);
  if (search) {
    parts.push(`${search.mode} documents, ${search.hit ? "with" : "without"} an accepted answer`);
    if (search.malformed) parts.push("repaired");
    if (search.error) parts.push(`failed: ${search.error}`);
  }
  return parts.join(" · ");
}

function lossSentence(rollout) {
  if (!rollout.in_loss) return "none: this trajectory is left out of the loss";
  const written = rollout.turns.reduce((sum, turn) => sum + (turn.tokens || 0), 0);
  const returned = rollout.turns.reduce((sum, turn) => sum + turn.observation_lengths.length, 0);
  const known = rollout.turns.every((turn) => turn.observation_lengths || !turn.observation);
  const all = known && rollout.prompt_tokens ? ` of ${rollout.prompt_tokens + written + returned}` : "";
  return rollout.documents_in_loss
    ? `${written + returned}${all} tokens: what the policy wrote and the documents (algorithm.mask_documents = false)`
    : `${written}${all} tokens: what the policy wrote`;
}

function fact(name, value) {
  return [make("dt", null, name), make("dd", null, value)];
}

function fill(details, rollout) {
  const facts = make("dl", null,
    ...fact("Answer", rollout.answer === null ? "(none)" : rollout.answer),
    ...fact("Accepted", rollout.answers.join(" · ")),
    ...fact("Scores", `reward ${format(rollout.reward)}, F1 ${format(rollout.f1)}, exact match ${format(rollout.exact_match)}`),
    ...fact("Question", `${rollout.source}, ${rollout.id}, sample ${rollout.sample}`),
    ...fact("In the loss", lossSentence(rollout)));
  const place = { token: rollout.prompt_tokens || 0 };
  const prompt = make("pre", { class: viewClasses() },
    make("span", { class: "token no-loss plain", title: "the prompt, not in the loss" }, promptOf(rollout)));
  const count = rollout.prompt_tokens ? `Prompt (${rollout.prompt_tokens} tokens, not in the loss)` : "Prompt (not in the loss)";
  details.append(facts, make("details", null, make("summary", { class: "soft" }, count), prompt));
  rollout.turns.forEach((turn, index) => {
    details.append(make("p", { class: "turn" }, describeTurn(turn, index)));
    const box = make("pre", { class: viewClasses() }, ...words(turn.text, turn.lengths, "plain", rollout.in_loss, place));
    if (turn.observation) {
      const documents = rollout.documents_in_loss;
      box.append(...words(turn.observation, turn.observation_lengths, "information", documents, place));
    }
    details.append(box);
  });
}

function makeRollout(rollout) {
  const chips = [`step ${rollout.step}`, `reward ${format(rollout.reward)}`, rollout.stop, `${rollout.turns.length} turns`];
  if (!rollout.in_loss) chips.push("not in the loss");
  if (data.runs.length > 1) chips.unshift(data.runs[rollout.run]);
  const summary = make("summary", null, make("bdi", { class: "question" }, rollout.question || "(no question)"));
  for (const chip of chips) summary.append(make("bdi", { class: "chip" }, chip));
  const details = make("details", { class: "rollout" }, summary);
  details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) fill(details, rollout); });
  return details;
}

function textOf(rollout) {
  rollout.haystack ??= [rollout.question, rollout.answer || "", rollout.id, rollout.source, ...rollout.answers,
    ...rollout.turns.flatMap((turn) => [turn.text, turn.observation])].join("\n").toLowerCase();
  return rollout.haystack;
}

function showMore() {
  const next = reader.matching.slice(reader.shown, reader.shown + PAGE).map(makeRollout);
  reader.list.append(...next);
  reader.shown += next.length;
  reader.more.hidden = reader.shown >= reader.matching.length;
  reader.more.textContent = `Show ${Math.min(PAGE, reader.matching.length - reader.shown)} more`;
  reader.count.textContent = `${reader.matching.length} of ${data.rollouts.length} rollouts match, ${reader.shown} listed`;
  return next[0];
}

const ORDERS = {
  "last step first": (one, other) => other.step - one.step,
  "first step first": (one, other) => one.step - other.step,
  "lowest reward first": (one, other) => (one.reward ?? -Infinity) - (other.reward ?? -Infinity),
  "highest reward first": (one, other) => (other.reward ?? -Infinity) - (one.reward ?? -Infinity),
};

function applyFilters(filters) {
  const bound = (input, missing) => (input.value === "" || Number.isNaN(input.valueAsNumber) ? missing : input.valueAsNumber);
  const [fewest, most] = [bound(filters.low, -Infinity), bound(filters.high, Infinity)];
  const [first, last] = [bound(filters.first, -Infinity), bound(filters.last, Infinity)];
  const text = filters.text.value.toLowerCase();
  const bounded = fewest > -Infinity || most < Infinity;
  reader.matching = data.rollouts.filter((rollout) =>
    rollout.step >= first && rollout.step <= last
    && (!bounded || (rollout.reward !== null && rollout.reward >= fewest && rollout.reward <= most))
    && (filters.stop.value === "any" || String(filters.stops.indexOf(rollout.stop)) === filters.stop.value)
    && (filters.run.value === "any" || String(rollout.run) === filters.run.value)
    && (!text || textOf(rollout).includes(text)));
  reader.matching.sort(ORDERS[filters.order.value]);
  reader.list.replaceChildren();
  reader.shown = 0;
  showMore();
}

function choice(options) {
  const select = make("select", null);
  for (const [value, text] of options) select.append(make("option", { value }, text));
  return select;
}

function makeFilters() {
  const number = (step) => make("input", { type: "number", step, inputmode: "decimal" });
  const stops = [...new Set(data.rollouts.map((rollout) => rollout.stop))].sort();
  return {
    stops,
    text: make("input", { type: "search" }),
    low: number("any"),
    high: number("any"),
    first: number("1"),
    last: number("1"),
    stop: choice([["any", "any"], ...stops.map((stop, index) => [String(index), stop || "(none)"])]),
    run: choice([["any", "all"], ...data.runs.map((run, index) => [String(index), run])]),
    order: choice(Object.keys(ORDERS).map((name) => [name, name])),
  };
}

function colourKey() {
  const key = make("p", { class: "key soft" });
  for (const kind of ["think", "search", "information", "answer"]) key.append(make("span", { class: kind }, kind));
  key.append(make("span", { class: "plain" }, "outside tags"));
  const mask = make("p", { class: "soft words by-mask" }, make("span", { class: "in-loss" }, "solid line: in the loss"), " · ",
    make("span", { class: "no-loss" }, "dotted line: not in the loss"), " · ∅: a token without text of its own");
  return [key, mask];
}

function showReader() {
  const place = document.getElementById("reader");
  if (!data.rollouts.length) { place.append(make("p", { class: "soft" }, "No rollouts recorded.")); return; }
  const filters = makeFilters();
  const tick = (text) => {
    const box = make("input", { type: "checkbox", checked: true });
    return { box, label: make("label", { class: "tick" }, box, text) };
  };
  const [mask, tokens] = [tick("Show the loss mask"), tick("Set tokens apart")];
  reader.view = { mask: mask.box, tokens: tokens.box };
  const redraw = () => reader.list.querySelectorAll("pre.words").forEach((box) => box.setAttribute("class", viewClasses()));
  [mask.box, tokens.box].forEach((box) => box.addEventListener("change", redraw));
  const field = (name, input, half) => make("label", half ? { class: "half" } : null, name, input);
  const form = make("form", { class: "controls", role: "search", "aria-label": "Filter rollouts" },
    field("Text in question, answer or turns", filters.text), field("Reward from", filters.low, true),
    field("Reward to", filters.high, true), field("Step from", filters.first, true), field("Step to", filters.last, true),
    field("Stop reason", filters.stop), ...(data.runs.length > 1 ? [field("Run", filters.run)] : []),
    field("Order", filters.order), make("button", { type: "reset" }, "Clear filters"), mask.label, tokens.label);
  form.addEventListener("submit", (event) => event.preventDefault());
  const filterInputs = Object.values(filters).filter((input) => input instanceof HTMLElement);
  let waiting = 0;
  for (const input of filterInputs) {
    input.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => applyFilters(filters), 120); });
  }
  form.addEventListener("reset", () => setTimeout(() => { applyFilters(filters); redraw(); }));
  reader.count = make("p", { role: "status", class: "soft" });
  reader.list = make("div", null);
  reader.more = make("button", { type: "button" });
  reader.more.addEventListener("click", () => showMore()?.querySelector("summary").focus());
  place.append(form, ...colourKey(), reader.count, reader.list, reader.more);
  applyFilters(filters);
}

showReader();
