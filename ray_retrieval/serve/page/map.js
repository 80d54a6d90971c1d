// A map of the index on a canvas: what is near in the index is near here. Drag to move, wheel or pinch to zoom.

import { loadPicture } from "./api.js";
import { count, h, nameOf, say, words } from "./dom.js";

const HUES = [222, 28, 152, 338, 268, 48, 190, 4, 96, 305];
const PICTURES = 70; // spots on screen, from which on their pictures are drawn
const NEAREST = 14; // pixels from a spot within which it is meant
const MOST_ZOOM = 60;

export function drawMap(place, { spots, method }, addressOf) {
  const canvas = h("canvas", {
    tabindex: 0,
    role: "application",
    "aria-label": `Map of ${count(spots.length, "image")}`,
    "aria-describedby": "map-help",
  });
  const preview = h("div", { class: "preview", hidden: true });
  const zoomBy = (factor, name, label) =>
    h("button", { type: "button", "aria-label": label, on: { click: () => zoom(factor, ...middle()) } }, name);
  const reset = h(
    "button",
    { type: "button", on: { click: () => ((view = { x: 0, y: 0, zoom: 1 }), draw()) } },
    "Whole map",
  );
  const frame = h(
    "div",
    { class: "map-frame" },
    canvas,
    preview,
    h("div", { class: "map-buttons" }, zoomBy(1.6, "+", "Zoom in"), zoomBy(1 / 1.6, "−", "Zoom out"), reset),
  );
  const classes = [...new Set(spots.map((spot) => words(spot.class_name)))].sort((a, b) =>
    a.localeCompare(b, "en", { numeric: true }),
  );
  const legend = legendOf();
  place.replaceChildren(
    frame,
    legend ?? "",
    h(
      "p",
      { class: "quiet", id: "map-help" },
      `Laid out by ${method}. Drag to move, scroll or pinch to zoom, click an image to search by it. By keyboard: arrow keys go from image to image, + and − zoom, Enter searches.`,
    ),
  );

  let size = [0, 0];
  let view = { x: 0, y: 0, zoom: 1 };
  let at = null; // the spot that is pointed at
  let only = null; // the class that stands out
  let waiting = 0;
  const pictures = new Map();
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function colour(name, strength = 1) {
    const which = classes.indexOf(name);
    const turn = Math.floor(which / HUES.length);
    return `hsl(${HUES[which % HUES.length] + 17 * turn} ${classes.length > 1 ? 62 : 50}% ${dark.matches ? 66 : 45}% / ${strength})`;
  }

  function legendOf() {
    if (classes.length < 2 || classes.length > 24) return null;
    const key = (name) => {
      const mark = h("span", { class: "mark" });
      const button = h(
        "button",
        { type: "button", "aria-pressed": "false", on: { click: () => single(name) } },
        mark,
        name || "no label",
      );
      button.dataset.name = name;
      return button;
    };
    return h("div", { class: "legend", role: "group", "aria-label": "Labels" }, classes.map(key));
  }

  function single(name) {
    only = only === name ? null : name;
    paintLegend();
    draw();
  }

  function paintLegend() {
    for (const button of legend?.children ?? []) {
      button.setAttribute("aria-pressed", String(button.dataset.name === only));
      button.firstChild.style.background = colour(button.dataset.name);
    }
  }

  const margin = () => Math.min(40, size[0] * 0.06);
  const onScreen = ({ x, y }) => {
    const room = size.map((side) => side - 2 * margin());
    return [margin() + (x - view.x) * room[0] * view.zoom, margin() + (y - view.y) * room[1] * view.zoom];
  };

  function draw() {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      paint();
    });
  }

  function paint() {
    if (!canvas.isConnected) return;
    canvas.style.touchAction = view.zoom > 1 ? "none" : "pan-y"; // of the whole map a finger scrolls the page
    const sharp = devicePixelRatio || 1;
    const context = canvas.getContext("2d");
    context.setTransform(sharp, 0, 0, sharp, 0, 0);
    context.clearRect(0, 0, ...size);
    const visible = spots
      .map((spot) => [spot, ...onScreen(spot)])
      .filter(([, x, y]) => x > -40 && y > -40 && x < size[0] + 40 && y < size[1] + 40);
    const close = visible.length <= PICTURES && view.zoom > 1;
    const radius = Math.min(7, 3.2 + 0.6 * Math.log2(view.zoom));
    for (const [spot, x, y] of visible) {
      const name = words(spot.class_name);
      const faded = only !== null && name !== only;
      const image = close && !faded ? pictureOf(spot) : null;
      if (image) drawPicture(context, image, x, y, colour(name), 56);
      else {
        context.beginPath();
        context.arc(x, y, radius, 0, 2 * Math.PI);
        context.fillStyle = colour(name, faded ? 0.12 : 0.85);
        context.fill();
      }
    }
    if (at) mark(context, close);
  }

  function mark(context, close) {
    const [x, y] = onScreen(at);
    context.beginPath();
    if (close) context.rect(x - 32, y - 32, 64, 64);
    else context.arc(x, y, 9, 0, 2 * Math.PI);
    context.lineWidth = 2.5;
    context.strokeStyle = getComputedStyle(canvas).color;
    context.stroke();
    preview.classList.toggle("far", close);
    preview.style.left = `${Math.min(Math.max(x, 84), size[0] - 84)}px`;
    preview.style.top = `${y}px`;
    preview.classList.toggle("below", y < 220);
  }

  function drawPicture(context, image, x, y, frameColour, most) {
    const scale = most / Math.max(image.naturalWidth, image.naturalHeight);
    const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
    context.fillStyle = frameColour;
    context.fillRect(x - width / 2 - 2, y - height / 2 - 2, width + 4, height + 4);
    context.imageSmoothingEnabled = image.naturalWidth > 48;
    context.drawImage(image, x - width / 2, y - height / 2, width, height);
  }

  // A picture once it has come; the first question fetches it.
  function pictureOf(spot) {
    let image = pictures.get(spot.id);
    if (!image) {
      image = new Image();
      pictures.set(spot.id, image);
      image.addEventListener("load", draw);
      loadPicture(image, `${spot.image}&size=128`).catch(() => {});
    }
    return image.complete && image.naturalWidth ? image : null;
  }

  function point(spot, aloud = false) {
    if (spot === at) return;
    at = spot;
    preview.hidden = !spot;
    canvas.classList.toggle("pointing", Boolean(spot));
    if (spot) {
      const image = h("img", { alt: "" });
      loadPicture(image, `${spot.image}&size=256`).catch(() => {});
      preview.replaceChildren(image, h("span", {}, nameOf(spot)));
      if (aloud) say(nameOf(spot));
    }
    draw();
  }

  function nearest(x, y, within) {
    let best = null;
    let least = within;
    for (const spot of spots) {
      if (only !== null && words(spot.class_name) !== only) continue;
      const [left, top] = onScreen(spot);
      const distance = Math.hypot(left - x, top - y);
      if (distance < least) [best, least] = [spot, distance];
    }
    return best;
  }

  function zoom(factor, x, y) {
    const next = Math.min(MOST_ZOOM, Math.max(1, view.zoom * factor));
    const room = size.map((side) => side - 2 * margin());
    // What is under the pointer stays there.
    const under = [(x - margin()) / (room[0] * view.zoom), (y - margin()) / (room[1] * view.zoom)];
    const after = [(x - margin()) / (room[0] * next), (y - margin()) / (room[1] * next)];
    view = { x: view.x + under[0] - after[0], y: view.y + under[1] - after[1], zoom: next };
    bound();
    draw();
  }

  // Where to zoom without a pointer: at the image that is pointed at, else at the one nearest to the middle.
  function middle() {
    const centre = size.map((side) => side / 2);
    const spot = at ?? nearest(...centre, Infinity);
    return spot ? onScreen(spot) : centre;
  }

  function pan(x, y) {
    view.x -= x / ((size[0] - 2 * margin()) * view.zoom);
    view.y -= y / ((size[1] - 2 * margin()) * view.zoom);
    bound();
    draw();
  }

  function bound() {
    const most = 1 - 1 / view.zoom;
    view.x = Math.min(most + 0.1 / view.zoom, Math.max(-0.1 / view.zoom, view.x));
    view.y = Math.min(most + 0.1 / view.zoom, Math.max(-0.1 / view.zoom, view.y));
    if (view.zoom === 1) view.x = view.y = 0;
  }

  // From image to image: the nearest one that lies in the direction of the arrow.
  function stepTo(dx, dy) {
    const from = at ? onScreen(at) : [size[0] / 2, size[1] / 2];
    let best = null;
    let least = Infinity;
    for (const spot of spots) {
      if (spot === at || (only !== null && words(spot.class_name) !== only)) continue;
      const [x, y] = onScreen(spot);
      const along = (x - from[0]) * dx + (y - from[1]) * dy;
      const aside = Math.abs((x - from[0]) * dy) + Math.abs((y - from[1]) * dx);
      if (at && (along <= 0.01 || aside > 2 * along)) continue;
      const cost = at ? along + 2 * aside : Math.hypot(x - from[0], y - from[1]);
      if (cost < least) [best, least] = [spot, cost];
    }
    if (!best) return;
    const [x, y] = onScreen(best);
    if (x < 0 || y < 0 || x > size[0] || y > size[1]) pan(size[0] / 2 - x, size[1] / 2 - y);
    point(best, true);
  }

  const search = (spot) => {
    const anchor = h("a", { href: addressOf(spot), "data-go": true, hidden: true });
    frame.append(anchor);
    anchor.click();
  };

  const fingers = new Map();
  let moved = 0;
  let spread = 0;
  const offset = (event) => {
    const edge = canvas.getBoundingClientRect();
    return [event.clientX - edge.left, event.clientY - edge.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return; // the browser's menu takes the end of such a press away
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, offset(event));
    if (fingers.size === 1) moved = 0;
    spread = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = offset(event);
    const before = fingers.get(event.pointerId);
    if (!before) return point(nearest(...now, NEAREST));
    fingers.set(event.pointerId, now);
    const travel = [now[0] - before[0], now[1] - before[1]];
    moved += Math.hypot(...travel);
    pan(travel[0] / fingers.size, travel[1] / fingers.size);
    if (fingers.size === 2) {
      const [one, two] = [...fingers.values()];
      const apart = Math.hypot(one[0] - two[0], one[1] - two[1]);
      if (spread) zoom(apart / spread, (one[0] + two[0]) / 2, (one[1] + two[1]) / 2);
      spread = apart;
    }
    return undefined;
  });
  const up = (event) => {
    if (!fingers.delete(event.pointerId) || fingers.size || moved > 6 || event.type === "pointercancel") return;
    const spot = nearest(...offset(event), NEAREST * (event.pointerType === "touch" ? 1.6 : 1));
    // A finger cannot hover: its first tap shows the image, the second one searches.
    if (spot && (event.pointerType !== "touch" || spot === at)) search(spot);
    else point(spot);
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  // A finger that is lifted leaves as well; what it has shown stays for its second tap.
  canvas.addEventListener("pointerleave", ({ pointerType }) => {
    if (pointerType !== "touch" && !fingers.size && document.activeElement !== canvas) point(null);
  });
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (view.zoom === 1 && event.deltaY > 0) return; // the page scrolls on
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...offset(event));
    },
    { passive: false },
  );
  canvas.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (arrow) stepTo(...arrow);
    else if (event.key === "+" || event.key === "=") zoom(1.4, ...middle());
    else if (event.key === "-") zoom(1 / 1.4, ...middle());
    else if (event.key === "0") reset.click();
    else if (event.key === "Enter" && at) search(at);
    else return;
    event.preventDefault();
  });
  dark.addEventListener("change", () => (paintLegend(), draw()));
  new ResizeObserver(() => {
    size = [frame.clientWidth, frame.clientHeight];
    const sharp = devicePixelRatio || 1;
    canvas.width = size[0] * sharp;
    canvas.height = size[1] * sharp;
    draw();
  }).observe(frame);
  paintLegend();
}
