// What the address says is what the page shows: each search is an entry of the browser's history.
//
//   view     index: the page about the index; else the search
//   index    name of the index that is searched; none: the first
//   id from  an image of the index `from` is the query
//   upload   an image of this browser is the query; its content lies in the tab's session storage
//   box      left,top,right,bottom of what counts of the query, in pixels
//   k where label rerank    of the search
//   with with-rerank        the index and the re-ranking beside it, to compare
//   seed     of the random selection at the start

import { Failure, dataUrl } from "./api.js";

export const FIRST = 24; // hits at first: fills rows of two, three, four and six
const NAMES = [
  "view",
  "index",
  "id",
  "from",
  "upload",
  "box",
  "k",
  "where",
  "label",
  "rerank",
  "with",
  "with-rerank",
  "seed",
];

export function read() {
  const given = new URLSearchParams(location.search);
  const state = {};
  for (const name of NAMES) if (given.get(name)) state[name] = given.get(name);
  if (!/^\d{1,9}$/.test(state.seed)) delete state.seed;
  state.k = Math.max(1, Math.floor(Number(state.k)) || FIRST);
  const box = state.box?.split(",").map(Number);
  state.box = box?.length === 4 && box.every(Number.isFinite) && box[2] > box[0] && box[3] > box[1] ? box : undefined;
  return state;
}

export function address(state) {
  const wanted = new URLSearchParams();
  for (const name of NAMES) {
    const value = name === "k" && state.k === FIRST ? undefined : name === "box" ? state.box?.join(",") : state[name];
    if (value !== undefined && value !== null && value !== "") wanted.set(name, value);
  }
  const said = wanted.toString();
  return location.pathname + (said && `?${said}`);
}

// What stays from one search to the next: where it looks, not what for.
export function searched(state, query) {
  const { index, where, label, rerank } = state;
  return { index, where, label, rerank, with: state.with, "with-rerank": state["with-rerank"], k: FIRST, ...query };
}

// Where an entry was scrolled to goes with it, for reloads and the way forward.
let noting = 0;
const note = () => history.replaceState({ scroll: scrollY }, "");
addEventListener("scroll", () => {
  clearTimeout(noting);
  noting = setTimeout(note, 200);
});

let show = () => {};
let shown = location.search; // what the page shows; a link within it changes the address elsewhere only
history.scrollRestoration = "manual";

export function onChange(render) {
  show = (how) => {
    shown = location.search;
    return render(how);
  };
  addEventListener("popstate", ({ state }) => {
    clearTimeout(noting); // it was of another entry
    if (location.search !== shown) show({ restore: state?.scroll ?? 0 });
    else if (state) scrollTo({ top: state.scroll });
  });
}

// Shows what an address says.
export function visit(link, { replace = false, ...how } = {}) {
  clearTimeout(noting);
  note();
  history[replace ? "replaceState" : "pushState"]({ scroll: replace ? scrollY : 0 }, "", link);
  return show(how);
}

export const go = (state, how) => visit(address(state), how);

// Puts what was chosen for who looks into the address, so that the way back leads to it.
export function settle(state) {
  history.replaceState(history.state, "", address(state));
  shown = location.search;
}

// Uploads: in this tab for as long as it is open, in its session storage to outlive a reload.

const uploads = new Map();
const STORED = "upload:";

// A file may be changed, deleted or let go by a phone after it was chosen: its bytes are kept, not where they lie.
async function copied(file) {
  try {
    return new Blob([await file.arrayBuffer()], { type: file.type });
  } catch {
    throw new Failure("This browser cannot read the file. Choose it again.", { status: 410 });
  }
}

export async function keep(file, name) {
  const blob = await copied(file);
  // The time comes first, so that tokens are in the order of their making.
  const token = Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
  uploads.set(token, { blob, name });
  const item = JSON.stringify({ name, data: await dataUrl(blob) });
  const older = Object.keys(sessionStorage)
    .filter((one) => one.startsWith(STORED))
    .sort();
  const gone = [];
  for (;;) {
    try {
      sessionStorage.setItem(STORED + token, item);
      return token;
    } catch {
      if (!older.length) break;
      gone.push([older[0], sessionStorage.getItem(older[0])]);
      sessionStorage.removeItem(older.shift());
    }
  }
  // Too large for it alone: it lasts until the next reload, and the others as long as before.
  for (const [one, content] of gone) sessionStorage.setItem(one, content);
  return token;
}

export async function kept(token) {
  if (uploads.has(token)) return uploads.get(token);
  const item = sessionStorage.getItem(STORED + token);
  if (item === null) return null;
  const { name, data } = JSON.parse(item);
  const [head, content] = data.split(",", 2);
  const type = head.slice(5).split(";")[0];
  const upload = { blob: new Blob([Uint8Array.from(atob(content), (one) => one.charCodeAt(0))], { type }), name };
  uploads.set(token, upload);
  return upload;
}
