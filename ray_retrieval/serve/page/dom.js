// Elements and words.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

function furnish(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

// An element; text among the children is text, whatever it holds.
export const h = (tag, attributes, ...children) => furnish(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => furnish(document.createElementNS(SVG, tag), attributes, children);

export const number = (value, digits = 3) => value.toLocaleString("en", { maximumFractionDigits: digits });
export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;
export const words = (value) => {
  if (Array.isArray(value)) return value.map(words).join(", ");
  return value !== null && typeof value === "object" ? JSON.stringify(value) : (value ?? "");
};
export const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);
export const milliseconds = (value) => `${value < 10 ? number(Math.max(0.1, value), 1) : number(value, 0)} ms`;

export function bytes(value) {
  const units = ["bytes", "KB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit += 1) value /= 1024;
  return `${number(value, value < 10 && unit ? 1 : 0)} ${units[unit]}`;
}

export function ordinal(value) {
  const ending = value % 100 > 10 && value % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][value % 10] ?? "th");
  return `${value}${ending}`;
}

// What people call an image: its class, else its file, else its id.
export const nameOf = ({ class_name: className, label, path, id }) =>
  words(className) || (words(label) !== "" ? `class ${words(label)}` : "") || path || id;

// Says something to those who do not see it.
export function say(text) {
  $("said").textContent = "";
  requestAnimationFrame(() => ($("said").textContent = text));
}

// Whether the pointer is outside a dialog's frame: its padding and what is beside it are the dialog to an event.
function beside(dialog, { target, clientX: x, clientY: y }) {
  const { left, top, right, bottom } = dialog.getBoundingClientRect();
  return target === dialog && (x < left || x > right || y < top || y > bottom);
}

// Opens a dialog; a click beside it, or Escape, closes it, and the focus returns where it was.
export function open(dialog, ...children) {
  dialog.replaceChildren(...children);
  let began = false; // beside it: a drag from within that ends there is no click
  dialog.onpointerdown = (event) => {
    began = beside(dialog, event);
  };
  dialog.onclick = (event) => {
    if (began && beside(dialog, event)) dialog.close();
  };
  if (!dialog.open) dialog.showModal();
}

export function closer(dialog) {
  const cross = svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: "M6 6l12 12M18 6 6 18" }));
  return h(
    "button",
    { type: "button", class: "close", "aria-label": "Close", on: { click: () => dialog.close() } },
    cross,
  );
}
