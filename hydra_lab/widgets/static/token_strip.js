function draw(element, payload, { selected, onSelect }) {
  const root = frame(element, payload);
  const box = node("div", { className: "hydra-tokens", dir: "auto" });
  const marks = new Map(payload.marks.map((mark) => [mark.token, mark.label]));
  const items = payload.tokens.map((token, index) => {
    if (marks.has(index)) box.append(node("span", { className: "hydra-mark" }, marks.get(index)));
    const style = token.fill ? { background: token.fill, color: token.ink } : {};
    const span = node("span", { className: "hydra-token", style }, token.text);
    box.append(span);
    return item(span, index, [["text", token.text.replace("\n", "")], ...token.details]);
  });
  root.append(legend(payload.legend), box);
  return interact(root, [items], { selected, onSelect });
}
