function draw(element, payload, { selected, onSelect }) {
  const root = frame(element, payload);
  const scroll = node("div", { className: "hydra-scroll" });
  const { width, height } = payload;
  const canvas = svgNode("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  const add = (parent, { tag, attributes, text }) => parent.append(svgNode(tag, attributes, text));
  for (const shape of payload.shapes) add(canvas, shape);
  const rows = payload.rows.map((row) =>
    row.map(({ value, details, shapes }) => {
      const group = svgNode("g");
      for (const shape of shapes) add(group, shape);
      canvas.append(group);
      return item(group, value, details);
    }),
  );
  scroll.append(canvas);
  if (payload.legend) root.append(legend(payload.legend));
  root.append(scroll);
  if (payload.note) root.append(node("div", { className: "hydra-note" }, payload.note));
  return interact(root, rows, { selected, onSelect });
}
