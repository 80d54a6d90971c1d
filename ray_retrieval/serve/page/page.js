// The page of the search server. No build step: the browser loads these modules as they are.

import { Failure, alive, indexes, key, link, original, sample, search, wrongWithKey } from "./api.js";
import { showAbout } from "./about.js";
import { $, closer, count, h, number, open, say } from "./dom.js";
import { askForMissing, factsOfQuery, prepareQuery, setLimits, showQuery } from "./query.js";
import { button, loading, showError, showHits, showSample, showWaiting } from "./results.js";
import { FIRST, address, go, kept, onChange, read, searched, settle, visit } from "./state.js";
import { prepareSettings, settingsOf, showSettings, whereOf } from "./settings.js";
import { showWhy } from "./why.js";

const SAMPLE = 18; // images of the random selection
const REMEMBERED = 40; // answers that the back button finds without asking

let served = null; // what GET /v1/indexes said
let stale = true; // it is asked again before the page goes on
let running = null; // AbortController of what is under way
const answers = new Map(); // answers by what was asked

const indexOf = (name) => served.indexes.find((one) => one.name === name) ?? served.indexes[0];
const rowsOf = (name) => indexOf(name).rows;
const isKnown = ({ name, version, model }) =>
  served.indexes.some((one) => one.name === name && one.version === version && one.model === model);

const versions = () => served?.indexes.map(({ name, version, model }) => [name, version, model]);

// What is served; what was answered by versions or models before is forgotten.
async function learn() {
  const before = JSON.stringify(versions());
  served = await indexes();
  setLimits(served);
  if (JSON.stringify(versions()) === before) return;
  answers.clear();
  $("index-choice").hidden = served.indexes.length < 2;
  const chosen = $("index").value;
  const option = (name) => h("option", { value: name, selected: name === chosen }, name);
  $("index").replaceChildren(...served.indexes.map(({ name }) => option(name)));
}

async function remembered(asked, fetch) {
  // With the versions: an answer that is on its way when a new one is told would be kept as its.
  const name = JSON.stringify([asked, versions()]);
  const answer = answers.has(name) ? answers.get(name) : await fetch();
  answers.delete(name);
  if (answer.partial) return answer; // the next time it may be whole
  answers.set(name, answer); // the last to go
  if (answers.size > REMEMBERED) answers.delete(answers.keys().next().value);
  return answer;
}

// The query as an index can be asked for it: by id in the index that has it, elsewhere by the image itself.
async function exampleFor(state, index, signal) {
  if (state.upload) {
    const held = await kept(state.upload);
    if (held) return { blob: held.blob };
    throw new Failure("The image of this search is no longer in this tab. Choose it again.", { status: 410 });
  }
  const from = state.from ?? served.indexes[0].name;
  if (from === index) return { id: state.id };
  return { blob: await remembered(["original", from, state.id], () => original(from, state.id, signal)) };
}

async function askFor(state, setting, signal, why = false) {
  const { index, asked: rerank } = setting;
  const wanted = { index, k: Math.min(state.k, served.max_k), where: whereOf(state), rerank, ...(why && { why }) };
  return remembered([state.id, state.from, state.upload, state.box, wanted], async () => {
    const example = await exampleFor(state, index, signal);
    return search({ example, box: state.box, ...wanted }, signal);
  });
}

const linkTo =
  (state) =>
  (hit, { index }) =>
    address(searched(state, { id: hit.id, index: state.index, from: index }));

// How: `restore` the scroll position of an entry of the history; `quiet` leave scroll and focus where they are;
// `kept` go on after so many hits; `initial` nobody has asked for anything yet; `renewed` what is served is known anew.
async function render(how = {}) {
  const { restore, kept: shownBefore, quiet, initial, renewed } = how;
  running?.abort();
  interrupted = false;
  // What a dialog is about is no longer there.
  if (!quiet) for (const name of ["cropping", "why"]) $(name).close();
  const controller = (running = new AbortController());
  const state = read();
  if (stale && !(await connect(how))) return;
  if (controller.signal.aborted) return; // something else was asked for meanwhile
  const index = indexOf(state.index);
  state.from ??= state.id ? index.name : undefined;
  const about = state.view === "index";
  $("search").hidden = about;
  $("about").hidden = !about;
  $("results").setAttribute("aria-busy", String(!about));
  frame(state, index, about);
  try {
    if (about) {
      await learn(); // versions come and go
      controller.signal.throwIfAborted();
      const now = indexOf(index.name);
      frame(state, now, true);
      showAbout(now, served, controller.signal, mayFocus(how));
    } else {
      showSettings(state, served, index);
      await showQuery(state, index.name);
      await (state.id || state.upload ? showSearch : showStart)(state, index, controller.signal, how);
    }
  } catch (error) {
    if (error.name === "AbortError" || controller.signal.aborted) return;
    if (error.status === 404 && !renewed) {
      // Another server may be in this one's place by now, and call its indices otherwise.
      const before = JSON.stringify(versions());
      if (!(await connect(how)) || controller.signal.aborted) return;
      if (JSON.stringify(versions()) !== before) return render({ ...how, renewed: true });
    }
    told(error, how);
  }
  if (running !== controller) return;
  if (restore !== undefined) scrollTo({ top: restore });
  else if (!shownBefore && !quiet) scrollTo({ top: 0 });
}

// Who is somewhere on the page stays there, unless what they asked for takes its place.
const mayFocus = ({ quiet, initial }) => !initial && (!quiet || document.activeElement === document.body);

function frame(state, index, about) {
  document.title = about ? `${index.name} · Image search` : "Image search";
  $("title").textContent = document.title;
  $("to-search").toggleAttribute("aria-current", false);
  for (const [id, here] of [
    ["to-search", !about],
    ["to-about", about],
  ]) {
    if (here) $(id).setAttribute("aria-current", "page");
    else $(id).removeAttribute("aria-current");
  }
  const named = state.index ? { index: state.index } : {};
  $("to-search").href = address({ ...named, k: FIRST });
  $("to-about").href = address({ ...named, view: "index", k: FIRST });
  document.querySelector(".brand").href = $("to-search").href;
  $("index").value = index.name;
  $("served").textContent = `${index.name} · version ${index.version} · model ${index.model.slice(0, 12)}`;
}

const newSeed = () => String(Math.floor(Math.random() * 1e6));

async function showStart(state, index, signal, { initial }) {
  loading(1);
  const seed = state.seed ?? newSeed();
  if (!state.seed) settle({ ...state, seed });
  const where = whereOf(state);
  const drawn = await remembered(["sample", index.name, seed, where], () =>
    sample(index.name, { count: SAMPLE, seed, where }, signal),
  );
  showSample(drawn, {
    state: (image) => searched(state, { id: image.id, from: index.name }),
    shuffle: () => go({ ...state, seed: newSeed() }, { quiet: true }),
    rows: index.rows,
    where,
    clearFilter,
    focus: !initial,
  });
  say(`${count(drawn.images.length, "image")} to begin with`);
}

async function showSearch(state, index, signal, how) {
  const settings = settingsOf(state, served, index);
  loading(settings.length);
  const found = await Promise.all(
    settings.map(async (setting) => {
      try {
        return { setting, answer: await askFor(state, setting, signal) };
      } catch (error) {
        if (settings.length === 1 || !(error instanceof Failure) || error.offline) throw error;
        return { setting, error };
      }
    }),
  );
  signal.throwIfAborted();
  const first = found.find(({ answer }) => answer)?.answer;
  if (first)
    factsOfQuery(
      first.query,
      first.index.name === state.from ? first.hits.find(({ id }) => id === state.id) : undefined,
    );
  if (first && !isKnown(first.index)) {
    await learn(); // a new version is served by now, or another model
    signal.throwIfAborted();
    frame(state, indexOf(index.name), false);
  }
  const most = Math.max(0, ...found.map(({ answer }) => answer?.hits.length ?? 0));
  const limit = Math.min(served.max_k, Math.max(...settings.map((one) => rowsOf(one.index))));
  const more =
    most >= state.k && most < limit
      ? () => go({ ...state, k: Math.min(2 * state.k, served.max_k) }, { replace: true, kept: most })
      : null;
  showHits(found, {
    rowsOf,
    linkTo: linkTo(state),
    again: () => render({ quiet: true }),
    clearFilter,
    more,
    kept: how.kept,
    focus: mayFocus(how),
    why: (answer, hit, setting) =>
      showWhy({
        answer,
        hit,
        setting,
        kind: indexOf(setting.index).kind,
        state,
        linkTo: linkTo(state),
        explain: () => askFor(state, setting, undefined, true),
        example: () => exampleFor(state, setting.index),
      }),
  });
  if (!first) say("That did not work");
  else
    say(most ? `${count(most, "image")} found in ${number(first.timings_ms.total, 0)} milliseconds` : "Nothing found");
}

const clearFilter = () => go({ ...read(), where: undefined, label: undefined, k: FIRST });

function told(error, { initial } = {}) {
  if (error.name === "AbortError") return;
  $("search").hidden = false;
  $("about").hidden = true;
  interrupted = error instanceof Failure && error.offline;
  if (interrupted) return showWaiting();
  if (!(error instanceof Failure)) console.error(error);
  if (error.status === 401) {
    const give = () => link.dispatchEvent(new Event("locked"));
    return showError("This server wants a key.", !initial, button("Give a key", give, "primary"));
  }
  const message = error instanceof Failure ? error.message : "Something went wrong on this page.";
  const buttons = [];
  if (error.status === 410 || error.status === 413 || error.status === 415)
    buttons.push(button("Choose another image", () => $("choose").click(), "primary"));
  else buttons.push(button("Try again", () => render({ quiet: true }), "primary"));
  if (read().where || read().label) buttons.push(button("Clear the filter", clearFilter));
  return showError(message, !initial, buttons);
}

// What is served: asked for at the start, and anew after the server was away or a key was given.
async function connect(how) {
  try {
    await learn();
  } catch (error) {
    told(error, how);
    return false;
  }
  stale = false;
  return true;
}

// The server away, and back.

let waiting = null;
let interrupted = false; // what is shown waits for the server

let again = null;

async function reconnect() {
  await alive().catch(() => null);
  // A browser may say that it is offline while the last answers still come, or a server on this machine answers.
  clearTimeout(again);
  if (!navigator.onLine && !waiting) again = setTimeout(reconnect, 3000);
}

link.addEventListener("offline", () => {
  $("offline").hidden = false;
  waiting ??= setInterval(reconnect, 3000);
});
link.addEventListener("online", () => {
  $("offline").hidden = true;
  clearInterval(waiting);
  waiting = null;
  say("The server is back");
  askForMissing();
  stale = true; // it may be another by now
  if (interrupted) render({ quiet: true });
});
addEventListener("offline", reconnect);
addEventListener("online", reconnect);
$("reconnect").addEventListener("click", reconnect);

// A key, where the server wants one.

link.addEventListener("locked", () => {
  if ($("key").open) return;
  const input = h("input", { type: "password", id: "key-input", autocomplete: "off", required: true, autofocus: true });
  const refused = "The server does not take this key.";
  const wrong = h("p", { class: "notice wrong", role: "alert", hidden: !key.get() }, refused);
  const give = (event) => {
    event.preventDefault();
    const given = input.value.trim();
    const problem = wrongWithKey(given);
    if (problem) {
      wrong.textContent = problem;
      wrong.hidden = false;
      return input.focus();
    }
    key.set(given);
    $("key").close();
    stale = true;
    answers.clear();
    render({ quiet: true });
  };
  open(
    $("key"),
    h("div", { class: "dialog-head" }, h("h2", { id: "key-title" }, "This server wants a key"), closer($("key"))),
    h(
      "form",
      { on: { submit: give } },
      wrong,
      h("label", {}, "Key", input),
      h("p", { class: "quiet" }, "It stays in this tab and is sent to this server alone."),
      h("div", { class: "buttons" }, h("button", { class: "primary" }, "Use the key")),
    ),
  );
});

// Links within the page are entries of its history; others, and those opened elsewhere, are the browser's.
document.addEventListener("click", (event) => {
  const anchor = event.target.closest?.("a[data-go]");
  if (
    !anchor ||
    event.defaultPrevented ||
    event.button ||
    event.metaKey ||
    event.ctrlKey ||
    event.shiftKey ||
    event.altKey
  )
    return;
  event.preventDefault();
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  visit(anchor.href);
});
$("index").addEventListener("change", () => {
  const state = read();
  const { id, upload, box, view } = state;
  const from = id ? (state.from ?? state.index ?? served.indexes[0].name) : undefined;
  go({ index: $("index").value, id, upload, box, view, from, k: FIRST }, { quiet: true });
});

prepareQuery(told);
prepareSettings();
onChange(render);
render({ quiet: true, initial: true, restore: history.state?.scroll });
