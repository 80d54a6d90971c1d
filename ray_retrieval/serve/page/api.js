// What the page asks of the server. Addresses are relative, so that it works behind a path prefix too.

import { upper } from "./dom.js";

export class Failure extends Error {
  constructor(message, { status = 0, where = null, retryAfter = null } = {}) {
    super(message);
    this.status = status; // 0: the server cannot be reached; null: it did not answer to this, but is there
    this.where = where;
    this.retryAfter = retryAfter;
  }

  get offline() {
    return this.status === 0;
  }
}

// Tells "offline" and "online" as the server goes and comes, and "locked" when it wants another key.
export const link = new EventTarget();
let reached = true;

function reach(now) {
  if (now === reached) return;
  reached = now;
  link.dispatchEvent(new Event(now ? "online" : "offline"));
}

const KEY = "key";
export const key = {
  // One that cannot be sent is none: the server asks for another.
  get: () => {
    const stored = sessionStorage.getItem(KEY);
    return stored && !wrongWithKey(stored) ? stored : null;
  },
  set: (value) => sessionStorage.setItem(KEY, value),
};

// Why a text is no key, or null. Quotation marks and invisible characters come along where a key is copied, and a
// header cannot carry them.
export function wrongWithKey(text) {
  if (!text) return "Type or paste a key.";
  const characters = [...text];
  const place = characters.findIndex((one) => one < "!" || one > "~");
  if (place < 0) return null;
  const odd = characters[place];
  const code = `U+${odd.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  const shown = /[\p{L}\p{M}\p{N}\p{P}\p{S}]/u.test(odd) ? `${odd} (${code})` : code;
  return `Character ${place + 1} of it is ${shown}, which no key has. Copy the key alone.`;
}

export const relative = (address) => address.replace(/^\//, "");

const sentence = ({ problem, mend }) =>
  [problem, mend]
    .filter(Boolean)
    .map((part) => `${upper(part)}.`)
    .join(" ");

const answers = () =>
  fetch("healthz").then(
    () => true,
    () => false,
  );

export async function ask(address, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // What stands before the server may cut off an upload: the server is there all the same.
    if (options.body instanceof FormData && (await answers()))
      throw new Failure("The image could not be sent, though the server answers.", { status: null });
    reach(false);
    throw new Failure("The server cannot be reached.");
  }
  reach(true);
  if (answer.ok) return answer;
  const said = (await answer.json().catch(() => null))?.error;
  if (answer.status === 401) link.dispatchEvent(new Event("locked"));
  throw new Failure(said ? sentence(said) : `The server answered with status ${answer.status}.`, {
    status: answer.status,
    where: said?.where,
    retryAfter: Number(answer.headers.get("Retry-After")) || null,
  });
}

// The content of an answer, which a bad network may cut off, and a proxy may give in the server's place.
async function content(answer, kind) {
  try {
    return await answer[kind]();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The answer cannot be read: it was cut off, or is not of this server.", { status: null });
  }
}

const json = async (address, options) => content(await ask(address, options), "json");
const post = (address, body, signal) =>
  json(address, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
const at = (index, rest) => `v1/indexes/${encodeURIComponent(index)}/${rest}`;
// An id may be any text, `..` too: so it stands in the query string.
const ofImage = (index, id, what) => at(index, `${what}?id=${encodeURIComponent(id)}`);

export const indexes = () => json("v1/indexes");
export const alive = () => ask("healthz");
export const map = (index, signal) => json(at(index, "map"), { signal });
export const original = async (index, id, signal) =>
  content(await ask(ofImage(index, id, "original"), { signal }), "blob");
export const originalAddress = (index, id) => ofImage(index, id, "original");
export const thumbnailAddress = (index, id) => ofImage(index, id, "thumbnail");

export function sample(index, { count, seed, where }, signal) {
  const wanted = new URLSearchParams({ count });
  if (seed) wanted.set("seed", seed);
  if (where) wanted.set("where", where);
  return json(at(index, `sample?${wanted}`), { signal });
}

// `example` is { id } or { blob }, and a box in pixels of the upright image or none.
export function search({ example, box, ...rest }, signal) {
  if (example.id !== undefined)
    return post("v1/search", { examples: [{ id: example.id, ...(box && { box }) }], ...rest }, signal);
  const form = new FormData();
  form.set("image", example.blob, "image");
  form.set("request", JSON.stringify({ ...rest, ...(box && { boxes: [box] }) }));
  return json("v1/search", { method: "POST", body: form, signal });
}

export async function match({ example, box, id, index }, signal) {
  const first = example.id === undefined ? { image: await base64(example.blob) } : { id: example.id };
  return post("v1/match", { first: { ...first, ...(box && { box }) }, second: { id }, index }, signal);
}

export const dataUrl = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

const base64 = async (blob) => (await dataUrl(blob)).split(",", 2)[1];

// Shows a picture of the server. Where a key is needed a browser cannot send it along: then it is fetched, when
// it comes near the screen. Until then the image says what it waits for, and may still show what it did before.
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      if (waits(target)) fetchPicture(target);
    }
  },
  { rootMargin: "400px" },
);

const waits = (image) => image.dataset.address !== undefined;

// Of several pictures that an image was to show, only the last counts, whichever comes last. An image that is gone
// by then would never load what it is given, nor let it go.
async function fetchPicture(image) {
  const { address } = image.dataset;
  const outdated = () => image.dataset.address !== address || !image.isConnected;
  try {
    const source = await pictureAddress(address);
    if (outdated()) release(source);
    else give(image, source);
  } catch {
    if (!outdated()) image.dispatchEvent(new Event("error"));
  }
}

export function showPicture(image, address) {
  if (!key.get()) return setPicture(image, relative(address));
  image.dataset.address = relative(address);
  near.observe(image);
  return image;
}

// Shows what lies at an address at once, or nothing.
export function setPicture(image, source) {
  delete image.dataset.address;
  if (source) image.src = source;
  else image.removeAttribute("src");
  return image;
}

// Asks once more for a picture that did not come.
export function askAgain(image) {
  if (waits(image)) near.observe(image);
  else if (image.src) setPicture(image, image.src);
}

// Whether an image has come to show what it was told last.
export const hasPicture = (image) => !waits(image) && image.complete && image.naturalWidth > 0;

// The address of a picture for where an element cannot ask by itself: SVG and canvas. Who is done releases it.
export async function pictureAddress(address) {
  if (!key.get()) return relative(address);
  return URL.createObjectURL(await content(await ask(relative(address)), "blob"));
}

export function release(address) {
  if (address.startsWith("blob:")) URL.revokeObjectURL(address);
}

// Gives a picture to an image, which keeps it.
function give(image, source) {
  for (const end of ["load", "error"]) image.addEventListener(end, () => release(source), { once: true });
  setPicture(image, source);
}

export async function loadPicture(image, address) {
  give(image, await pictureAddress(address));
}

// Opens a picture in a tab of its own, which could not send the key along.
export async function openPicture(address) {
  const tab = window.open("", "_blank"); // at once: after a wait it would be a pop-up
  try {
    const source = await pictureAddress(address);
    tab.opener = null;
    tab.location.replace(source);
    setTimeout(() => release(source), 60_000);
  } catch (error) {
    tab?.close();
    throw error;
  }
}
