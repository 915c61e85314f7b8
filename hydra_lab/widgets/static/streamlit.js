// A rerun that changes the selection alone keeps the drawing, and with it the focus and the scroll position.
const views = new WeakMap();

export default function ({ data, parentElement, setStateValue }) {
  const { selected, ...drawn } = data;
  const signature = JSON.stringify(drawn);
  const known = views.get(parentElement);
  if (known?.signature === signature && known.host.isConnected) {
    known.view.select(selected);
    return;
  }
  known?.host.remove();
  const host = node("div");
  parentElement.append(host);
  const view = draw(host, data, { selected, onSelect: (value) => setStateValue("selected", value) });
  views.set(parentElement, { signature, host, view });
}
