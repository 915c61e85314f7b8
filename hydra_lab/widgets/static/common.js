// Shared by the widgets. Text enters the page as text nodes only, so no token can become markup.

function node(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  const { style, attributes, ...rest } = properties;
  Object.assign(made, rest);
  Object.assign(made.style, style);
  for (const [name, value] of Object.entries(attributes ?? {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function svgNode(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

// Hover, focus, arrow keys and selection over rows of items {element, value, details}; one item is in the tab order.
function interact(root, rows, { selected, onSelect }) {
  const places = new Map();
  rows.forEach((row, r) => row.forEach((item, c) => places.set(item.element, { item, r, c })));
  const tip = node("div", { className: "hydra-tip", hidden: true, attributes: { role: "tooltip" } });
  root.append(tip);
  let current = null;

  const placeOf = (event) => {
    const element = event.target.closest?.("[data-item]");
    return element ? places.get(element) : undefined;
  };
  const show = ({ item }) => {
    tip.replaceChildren(
      ...item.details.map(([label, value]) =>
        node("div", {}, node("span", {}, label), node("b", { dir: "auto" }, value)),
      ),
    );
    tip.hidden = false;
    const outer = root.getBoundingClientRect();
    const inner = item.element.getBoundingClientRect();
    const left = inner.left - outer.left;
    tip.style.left = `${Math.max(0, Math.min(left, outer.width - tip.offsetWidth))}px`;
    const below = inner.bottom - outer.top + 4;
    const fits = inner.bottom + tip.offsetHeight + 4 < window.innerHeight;
    tip.style.top = `${fits ? below : inner.top - outer.top - tip.offsetHeight - 4}px`;
  };
  const hide = () => (tip.hidden = true);
  const reach = (place) => {
    if (current) current.item.element.setAttribute("tabindex", "-1");
    current = place;
    current.item.element.setAttribute("tabindex", "0");
  };
  const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
  const select = (value) => {
    for (const place of places.values()) {
      const chosen = value !== null && value !== undefined && same(place.item.value, value);
      place.item.element.setAttribute("aria-pressed", String(chosen));
      if (chosen) reach(place);
    }
  };
  const choose = (place) => {
    select(place.item.value);
    onSelect(place.item.value);
  };

  let focused = null;
  const rest = () => { // scrolling to a focused item also moves the pointer off the others
    if (focused?.item.element.matches(":focus-visible")) show(focused);
    else hide();
  };
  root.addEventListener("pointerover", (event) => {
    const place = placeOf(event);
    if (place) show(place);
    else rest();
  });
  root.addEventListener("pointerleave", rest);
  root.addEventListener("focusin", (event) => {
    const place = placeOf(event);
    if (!place) return;
    focused = place;
    reach(place);
    show(place);
  });
  root.addEventListener("focusout", () => {
    focused = null;
    hide();
  });
  root.addEventListener("click", (event) => {
    const place = placeOf(event);
    if (place) choose(place);
  });
  root.addEventListener("keydown", (event) => {
    const place = placeOf(event);
    if (!place) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(place);
      return;
    }
    if (event.key === "Escape") return hide();
    const next = neighbour(rows, place, event.key);
    if (!next) return;
    event.preventDefault();
    next.element.focus();
    next.element.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  if (places.size) reach(places.values().next().value);
  select(selected);
  return { select };
}

function neighbour(rows, { r, c }, key) {
  const alone = rows.length === 1;
  if (key === "ArrowRight" || (alone && key === "ArrowDown")) return rows[r][c + 1];
  if (key === "ArrowLeft" || (alone && key === "ArrowUp")) return rows[r][c - 1];
  if (key === "Home") return rows[r][0];
  if (key === "End") return rows[r].at(-1);
  const row = key === "ArrowDown" ? rows[r + 1] : key === "ArrowUp" ? rows[r - 1] : undefined;
  return row && row[Math.min(c, row.length - 1)];
}

function item(element, value, details) {
  element.dataset.item = "";
  element.setAttribute("tabindex", "-1");
  element.setAttribute("role", "button");
  element.setAttribute("aria-label", details.map((pair) => pair.join(" ")).join(", "));
  return { element, value, details };
}

function legend({ label, steps, low, high, keys }) {
  const parts = keys
    ? keys.map(({ name, fill, ink }) =>
        node("span", { className: "hydra-key", style: { background: fill, color: ink } }, name),
      )
    : [
        low,
        node("span", {
          className: "hydra-ramp",
          style: { background: `linear-gradient(90deg, ${steps.join(", ")})` },
        }),
        high,
      ];
  return node("div", { className: "hydra-legend" }, node("span", {}, `${label}:`), ...parts);
}

function frame(element, payload) {
  const root = node("div", {
    className: "hydra-widget",
    attributes: { role: "group", "aria-label": payload.label },
  });
  element.append(root);
  return root;
}
