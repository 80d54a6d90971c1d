// The page of the search server: takes an image, posts it to /search, shows the hits. No build step.

const FIRST = 24; // hits at first: fills rows of two, three, four and six
const SMALL = 96; // images of at most this side are enlarged pixel by pixel
const LARGEST = 1024; // the largest copy of an indexed image that the server hands out

const $ = (id) => document.getElementById(id);

let served = null; // what GET /index said
let query = null; // { blob, name, k } of the search that is shown
let running = null; // AbortController of the search under way
let shownQuery = null; // object URL of the query's picture

const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const words = (value) => (Array.isArray(value) ? value.join(", ") : value);
const relative = (address) => address.replace(/^\//, ""); // works behind a path prefix too

class Failure extends Error {}

async function ask(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const said = body?.error;
  throw new Failure(said ? sentence(said) : `The server answered with status ${answer.status}.`);
}

function sentence({ problem, mend }) {
  const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);
  return [problem, mend].filter(Boolean).map((part) => `${upper(part)}.`).join(" ");
}

function showError(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Failure)) console.error(error);
  $("error").textContent = error instanceof Failure ? error.message : "Something went wrong on this page.";
  $("error").hidden = false;
}

function markSmall(image) {
  image.addEventListener("load", () => {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
  });
}

function tile({ id, image, class_name: className, distance, similarity }) {
  const item = $("hit").content.cloneNode(true);
  const button = item.querySelector("button");
  const picture = item.querySelector("img");
  const name = words(className) || id;
  const far = distance === undefined ? "" : served?.kind === "vectors" ? `cosine ${similarity.toFixed(3)}` : `distance ${distance}`;
  markSmall(picture);
  picture.addEventListener("error", () => {
    picture.hidden = true;
    picture.parentElement.classList.add("missing");
    button.disabled = true;
  });
  picture.src = relative(image);
  item.querySelector(".name").textContent = name;
  item.querySelector(".distance").textContent = far;
  if (similarity === undefined) item.querySelector(".meter").remove();
  else item.querySelector(".meter span").style.width = `${100 * Math.max(0, similarity)}%`;
  button.title = id;
  button.setAttribute("aria-label", `Search by ${name}${far && `, ${far}`}`);
  button.addEventListener("click", () => searchByIndexed(image, name));
  return item;
}

function showStart() {
  $("results-title").textContent = served.rows ? "Or start from an indexed image" : "The index is empty";
  const measure =
    served.kind === "vectors"
      ? "The cosine says how alike two images are: 1 is the same."
      : "Distance counts the bits in which two images' codes differ: 0 is the same code.";
  $("explanation").textContent = served.rows
    ? `The nearest images of the index appear here. ${measure}`
    : "Add images to it, then restart the server.";
  $("hits").replaceChildren(...served.examples.map(tile));
}

function showHits({ hits, timings_ms: timings }) {
  $("results-title").textContent = hits.length === 1 ? "The nearest image" : `The ${hits.length} nearest images`;
  $("status").textContent = `of ${served ? served.rows.toLocaleString("en") : "the index"}, in ${Math.max(1, Math.round(timings.total))} ms`;
  $("explanation").textContent = "";
  const kept = query.k > FIRST ? $("hits").children.length : 0;
  $("hits").replaceChildren(...hits.map(tile));
  const limit = served ? Math.min(served.max_k, served.rows) : query.k;
  $("more").hidden = hits.length >= limit;
  // After "Show more" the keyboard goes on at the first new hit; after a new search, at the results.
  if (kept) $("hits").children[kept]?.querySelector("button").focus({ preventScroll: true });
  else $("results-title").focus({ preventScroll: true });
}

function showQuery(blob, name) {
  if (shownQuery) URL.revokeObjectURL(shownQuery);
  shownQuery = URL.createObjectURL(blob);
  $("query-image").src = shownQuery;
  $("query-picture").hidden = false;
  $("query").classList.add("filled");
  $("query-hint").textContent = "Drop or paste another image, or pick one below to search by it.";
  $("choose").textContent = "Choose another";
  $("query-facts").textContent = name;
}

// `source` is an image as a Blob, or a function that fetches one under an AbortSignal.
async function search(source, name, k = FIRST) {
  running?.abort();
  const controller = (running = new AbortController());
  const { signal } = controller;
  $("error").hidden = true;
  $("results").setAttribute("aria-busy", "true");
  $("more").disabled = true;
  try {
    const blob = source instanceof Blob ? source : await source(signal);
    if (served && blob.size > served.max_upload_bytes) {
      const most = (served.max_upload_bytes / 1024 ** 2).toFixed(0);
      throw new Failure(`The image has ${(blob.size / 1024 ** 2).toFixed(1)} MB, the server takes ${most}. Choose a smaller one.`);
    }
    const form = new FormData();
    form.set("image", blob, "image");
    form.set("k", String(served ? Math.min(k, served.max_k) : k));
    const answer = await ask("search", { method: "POST", body: form, signal });
    const found = await answer.json();
    if (query?.blob !== blob) showQuery(blob, name);
    query = { blob, name, k };
    $("query-facts").textContent = `${name} · ${found.query.width}\u00a0×\u00a0${found.query.height}\u00a0${found.query.format}`;
    showHits(found);
  } catch (error) {
    showError(error);
  } finally {
    if (running === controller) {
      running = null;
      $("results").setAttribute("aria-busy", "false");
      $("more").disabled = false;
    }
  }
}

function searchByIndexed(image, name) {
  window.scrollTo({ top: 0 });
  return search(async (signal) => (await ask(`${relative(image)}?size=${LARGEST}`, { signal })).blob(), name);
}

function take(files) {
  const file = [...(files ?? [])].find((one) => one.type.startsWith("image/")) ?? files?.[0];
  if (file) search(file, file.name || "Pasted image");
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // the same file may be chosen again
});
$("more").addEventListener("click", () => search(query.blob, query.name, 2 * query.k));
document.addEventListener("paste", (event) => take(event.clipboardData?.files));

let inside = 0; // dragenter and dragleave come for every element on the way
const dragging = (change) => {
  inside = Math.max(0, change === 0 ? 0 : inside + change);
  document.body.classList.toggle("dragging", inside > 0);
};
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => carriesFiles(event) && dragging(1));
document.addEventListener("dragleave", (event) => carriesFiles(event) && dragging(-1));
document.addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  dragging(0);
  take(event.dataTransfer.files);
});

markSmall($("query-image"));
try {
  served = await (await ask("index")).json();
  $("facts").textContent = `${count(served.rows, "image")} · ${served.kind === "vectors" ? `vectors of ${served.dimension}` : `${served.bits}-bit codes`}`;
  $("served").textContent = `Index version ${served.version} · model ${served.model}`;
  showStart();
} catch (error) {
  showError(error);
}
