// Figures are drawn when they come into view, in the colours of the reader's theme.
const inDark = matchMedia("(prefers-color-scheme: dark)");
const equivalents = JSON.parse(document.getElementById("dark-equivalents").textContent);
const drawn = new Set();

function draw(box) {
  let text = document.getElementById(box.dataset.figure).textContent;
  if (inDark.matches) text = text.replace(/#[0-9a-f]{6}\b|rgb\(\d+,\d+,\d+\)/gi, (colour) => equivalents[colour.toLowerCase()] ?? colour);
  const figure = JSON.parse(text);
  Plotly.react(box, figure.data, figure.layout, { responsive: true, displaylogo: false });
  drawn.add(box);
}

const boxes = document.querySelectorAll("[data-figure]");
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    observer.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "600px" });
boxes.forEach((box) => observer.observe(box));
inDark.addEventListener("change", () => drawn.forEach(draw));
addEventListener("beforeprint", () => boxes.forEach(draw));
