// Runs at the end of a copy of docs/explorer.html: moves its sliders and records the page's state.
const text = (id) => document.getElementById(id).textContent;
const set = (id, value, kind = "input") => {
  const control = document.getElementById(id);
  control.value = value;
  control.dispatchEvent(new Event(kind, { bubbles: true }));
};
const box = (node) => node.getBoundingClientRect();
const overlap = (a, b, low, high) => Math.min(a[high], b[high]) - Math.max(a[low], b[low]);

const said = { start: [text("rank-said"), text("weight-said"), text("block-said")] };
said.drawn = ["W", "A", "B"].map((id) => [box(document.getElementById(id)).width, box(document.getElementById(id)).height]);
set("model", "Llama-3-8B", "change");
set("rank", 12);
set("blocksize", 7);
set("weight", -300);
said.after = [text("rank-said"), text("steps"), text("block-said")];
said.hash = location.hash;
said.live = [...document.querySelectorAll("input[type=range]")].map((slider) => slider.getAttribute("aria-valuetext"));
said.right = Math.max(...[...document.querySelectorAll("body *")].map((node) => box(node).right));
const words = [...document.querySelectorAll("svg text")];
said.cut = words.filter((word) => {
  const a = box(word), b = box(word.ownerSVGElement);
  return a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom;
}).map((word) => word.textContent);
said.met = words.flatMap((one, i) => words.slice(i + 1).filter((other) =>
  overlap(box(one), box(other), "left", "right") > 1 && overlap(box(one), box(other), "top", "bottom") > 4,
).map((other) => [one.textContent, other.textContent]));
document.querySelectorAll("#targets input").forEach((checkbox) => checkbox.click());
said.boxes = document.querySelectorAll("#targets input:checked").length;
const pre = document.createElement("pre");
pre.id = "said";
pre.textContent = JSON.stringify(said);
document.body.append(pre);
