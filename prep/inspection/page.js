"use strict";
// The page is whole without this: titles show id and bytes. With it the tip is instant, says more, and follows the keyboard.
const tip = document.getElementById("tip");
const only = document.getElementById("only");
let at = null; // the token that the keyboard or a click chose
let shown = null;

function facts(token) {
  if (token.title) { // the browser's own tooltip would cover ours
    token.dataset.tip = token.title;
    token.removeAttribute("title");
  }
  const siblings = token.parentElement.children;
  const place = Array.prototype.indexOf.call(siblings, token);
  const marks = token.classList;
  const astride = marks.contains("astride") ? ", covers bytes outside its text too" : "";
  return `${token.dataset.tip.replace(", bytes", "\nbytes").replace(/, part/g, "\npart")}
${marks[0].replace("_", " ")}, ${marks.contains("on") ? "trained" : "not trained"}${astride}
token ${place} of ${siblings.length}`;
}

function show(token) {
  shown = token;
  tip.textContent = facts(token);
  tip.hidden = false;
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const above = box.bottom + tip.offsetHeight + 8 > innerHeight;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${above ? Math.max(4, box.top - tip.offsetHeight - 6) : box.bottom + 6}px`;
}

function hide() {
  tip.hidden = true;
}

function move(token) {
  at?.classList.remove("at");
  at = token;
  at.classList.add("at");
  at.scrollIntoView({ block: "nearest" });
  show(at);
}

function next(from, step) {
  let token = from;
  do token = step > 0 ? token?.nextElementSibling : token?.previousElementSibling;
  while (token && !token.getClientRects().length); // left out by the filter
  return token;
}

function edge(text, step) {
  const token = step > 0 ? text.firstElementChild : text.lastElementChild;
  return !token || token.getClientRects().length ? token : next(token, step);
}

const tokenOf = (event) => event.target.closest?.(".text > span");

document.addEventListener("mouseover", (event) => {
  const token = tokenOf(event);
  if (token) show(token);
  else hide();
});
document.addEventListener("scroll", () => (shown && shown === at && !tip.hidden ? show(at) : hide()), true);
document.addEventListener("click", (event) => {
  const token = tokenOf(event);
  if (token) move(token);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "t") only.click();
  if (event.key === "Escape") hide();
  const text = event.target.closest?.(".text");
  if (!text) return;
  const inside = at && text.contains(at) && at.getClientRects().length ? at : null;
  const goal = {
    ArrowRight: () => (inside ? next(inside, 1) : edge(text, 1)),
    ArrowLeft: () => (inside ? next(inside, -1) : edge(text, -1)),
    Home: () => edge(text, 1),
    End: () => edge(text, -1),
  }[event.key]?.();
  if (goal) {
    event.preventDefault();
    move(goal);
  }
});
