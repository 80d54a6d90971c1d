// The image to search by: chosen, dropped, pasted, photographed, or one of the index.

import { Failure, askAgain, hasPicture, originalAddress, setPicture, showPicture, thumbnailAddress } from "./api.js";
import { crop } from "./crop.js";
import { $, bytes, count, nameOf, number, say } from "./dom.js";
import { FIRST, go, keep, kept, read, searched } from "./state.js";

const SMALL = 96; // images of at most this side are enlarged pixel by pixel

let limits = { max_upload_bytes: Infinity, max_pixels: Infinity };
let shown = null; // object URL of an upload that is shown
let cutting = null; // AbortController of the frame of a region that waits for its picture
let taken = 0; // how many images were chosen, dropped or pasted
let complain = () => {};

// Smoothing would show what the model was never given.
export function markSmall(image) {
  image.addEventListener("load", () =>
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL),
  );
  return image;
}

export function missing(image) {
  image.addEventListener("error", () => {
    image.hidden = true;
    image.parentElement?.classList.add("missing");
  });
  return image;
}

// Asks again for the pictures that did not come.
export function askForMissing() {
  for (const image of document.querySelectorAll(".missing > img")) {
    image.hidden = false;
    image.parentElement.classList.remove("missing");
    askAgain(image);
  }
}

async function take(files) {
  const file = [...(files ?? [])].find((one) => one.type.startsWith("image/")) ?? files?.[0];
  if (!file) return;
  const turn = (taken += 1);
  const last = () => turn === taken; // a large one that was chosen before is ready after a small one
  try {
    const { blob, note } = await fitting(file);
    if (!last()) return;
    const token = await keep(blob, `${file.name || "Pasted image"}${note}`);
    if (last()) await go(searched(read(), { upload: token }));
  } catch (error) {
    if (last()) complain(error);
  }
}

// The server's limits hold for photographs too: a larger one is made smaller here, where it can be.
async function fitting(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  const pixels = bitmap ? bitmap.width * bitmap.height : 0;
  if (file.size <= limits.max_upload_bytes && pixels <= limits.max_pixels) {
    bitmap?.close();
    return { blob: file, note: "" };
  }
  const tooLarge = `The file has ${bytes(file.size)}, the server takes ${bytes(limits.max_upload_bytes)}.`;
  if (!bitmap) throw new Failure(`${tooLarge} Choose a smaller one.`, { status: 413 });
  let scale = Math.min(1, Math.sqrt(limits.max_pixels / pixels));
  for (let attempt = 0; attempt < 12; attempt += 1, scale *= 0.75) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.floor(bitmap.width * scale));
    canvas.height = Math.max(1, Math.floor(bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // under what is transparent, as the server has it
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
    if (blob && blob.size <= limits.max_upload_bytes) return { blob, note: " · made smaller to be sent" };
  }
  throw new Failure(`${tooLarge} Choose a smaller one.`, { status: 413 });
}

// Shows the query of a state. `name` is what an image of the index is called.
export async function showQuery(state, index) {
  const { id, upload } = state;
  const filled = Boolean(id || upload);
  $("search").classList.toggle("filled", filled);
  const held = upload && (await kept(upload));
  for (const name of ["query-picture", "crop"]) $(name).hidden = !held && !id;
  $("whole").hidden = !(filled && state.box);
  $("choose").textContent = filled ? "Another image" : "Choose an image";
  $("choose").classList.toggle("primary", !filled);
  if (!filled) {
    $("query-title").textContent = "Search by an image";
    $("query-facts").textContent = "";
    return;
  }
  const image = $("query-image");
  image.hidden = false;
  $("query-picture").classList.remove("missing");
  if (shown) URL.revokeObjectURL(shown);
  shown = held ? URL.createObjectURL(held.blob) : null;
  image.alt = "The image that is searched for";
  if (held || !id) setPicture(image, shown);
  else {
    const from = state.from ?? index;
    // A region is in pixels of the original, which the thumbnail need not have.
    showPicture(image, state.box ? originalAddress(from, id) : `${thumbnailAddress(from, id)}&size=512`);
  }
  $("query-title").textContent = held ? held.name : (id ?? "");
  $("query-facts").textContent = held || !id ? "" : `of ${state.from ?? index}`;
  showCut(state.box);
}

function showCut(box) {
  cutting?.abort();
  const { signal } = (cutting = new AbortController());
  const cut = $("query-cut");
  cut.hidden = true;
  if (!box) return;
  const image = $("query-image");
  const place = () => {
    if (!hasPicture(image)) return;
    const [left, top, right, bottom] = box;
    const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
    const x = image.offsetLeft + (image.clientWidth - image.naturalWidth * scale) / 2;
    const y = image.offsetTop + (image.clientHeight - image.naturalHeight * scale) / 2;
    const at = {
      left: x + left * scale,
      top: y + top * scale,
      width: (right - left) * scale,
      height: (bottom - top) * scale,
    };
    for (const [side, value] of Object.entries(at)) cut.style[side] = `${value}px`;
    cut.hidden = false;
  };
  image.addEventListener("load", place, { signal });
  place();
}

// What the server understood of the query, and what it is called, if it is among the hits.
export function factsOfQuery({ examples: [example] }, hit) {
  if (hit) $("query-title").textContent = nameOf(hit);
  const facts = hit && nameOf(hit) !== hit.id ? [hit.id] : [];
  if (example.width) facts.push(`${number(example.width)} × ${number(example.height)} ${example.format ?? ""}`);
  if (example.box) {
    const [left, top, right, bottom] = example.box;
    facts.push(`region of ${count(Math.round(right - left), "pixel")} × ${number(Math.round(bottom - top))}`);
  }
  if (!facts.length) return;
  $("query-facts").textContent = facts.join(" · ");
}

async function cropQuery() {
  const state = read();
  const held = state.upload && (await kept(state.upload));
  if (!held && !state.id) return;
  const index = state.from ?? state.index ?? $("index").value;
  const picture = (image) =>
    held ? setPicture(image, URL.createObjectURL(held.blob)) : showPicture(image, originalAddress(index, state.id));
  const box = await crop(markSmall(picture(document.createElement("img"))), state.box);
  if (box === undefined) return;
  say(box ? "Searching by the region" : "Searching by the whole image");
  await go({ ...read(), box: box ?? undefined, k: FIRST });
}

export function prepareQuery(onError) {
  complain = onError;
  missing(markSmall($("query-image")));
  $("query-image").addEventListener("error", () => ($("crop").hidden = true));
  $("query-image").addEventListener("load", () => ($("crop").hidden = !$("search").classList.contains("filled")));
  $("choose").addEventListener("click", () => $("file").click());
  $("photograph").addEventListener("click", () => $("camera").click());
  for (const input of [$("file"), $("camera")]) {
    input.addEventListener("change", () => {
      take(input.files);
      input.value = ""; // the same file may be chosen again
    });
  }
  $("crop").addEventListener("click", cropQuery);
  $("query-picture").addEventListener("click", cropQuery);
  $("query-picture").setAttribute("aria-label", "Crop the image");
  $("whole").addEventListener("click", () => go({ ...read(), box: undefined, k: FIRST }));
  document.addEventListener("paste", (event) => take(event.clipboardData?.files));
  addEventListener("resize", () => showCut(read().box));

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
}

export const setLimits = (said) => (limits = said);
