// What the hosts' own page script offers to extensions, and the checkbox on accordions.
"use strict";

function gradioApp() {
  return document;
}

const uiLoadedCallbacks = [];
const uiUpdateCallbacks = [];
const uiAfterUpdateCallbacks = [];
const uiTabChangeCallbacks = [];
let uiIsLoaded = false;
let afterUpdateTimer = null;

function onUiLoaded(callback) {
  uiLoadedCallbacks.push(callback);
  if (uiIsLoaded) callback();
}
function onUiUpdate(callback) {
  uiUpdateCallbacks.push(callback);
}
function onAfterUiUpdate(callback) {
  uiAfterUpdateCallbacks.push(callback);
}
function onUiTabChange(callback) {
  uiTabChangeCallbacks.push(callback);
}
function onOptionsChanged() {}

function runCallbacks(callbacks, argument) {
  for (const callback of callbacks) {
    try {
      callback(argument);
    } catch (error) {
      console.error("error running callback", callback, ":", error);
    }
  }
}

function updateInput(target) {
  const event = new Event("input", { bubbles: true });
  Object.defineProperty(event, "target", { value: target });
  target.dispatchEvent(event);
}

function switchTo(number) {
  document.querySelectorAll("#tabs > .tab-nav > button")[number].click();
}
function switch_to_txt2img() {
  switchTo(0);
}
function switch_to_img2img() {
  switchTo(1);
}
function get_uiCurrentTab() {
  return gradioApp().querySelector("#tabs > .tab-nav > button.selected");
}
function get_uiCurrentTabContent() {
  return gradioApp().querySelector('#tabs > [id^=tab_]:not([style*="display: none"])');
}

// Called when the value of an accordion's hidden checkbox changes: show it on the title, open or close.
function inputAccordionChecked(id, checked) {
  const visible = document.getElementById(id + "-visible-checkbox");
  if (visible) visible.checked = checked;
  const button = document.querySelector("#" + CSS.escape(id) + " .label-wrap");
  if (button && button.classList.contains("open") !== checked) button.click();
}

function setUpInputAccordion(accordion) {
  const button = accordion.querySelector(".label-wrap");
  const hidden = document.querySelector("#" + CSS.escape(accordion.id) + "-checkbox input");
  if (!button || !hidden || accordion.dataset.ready) return;
  accordion.dataset.ready = "1";
  const box = document.createElement("input");
  box.type = "checkbox";
  box.id = accordion.id + "-visible-checkbox";
  box.checked = hidden.checked;
  box.setAttribute("aria-label", button.textContent.trim());
  box.addEventListener("click", (event) => {
    event.stopPropagation();
    if (hidden.checked !== box.checked) hidden.click();
  });
  button.insertBefore(box, button.firstChild);
}

function lookAtPage() {
  document.querySelectorAll(".input-accordion").forEach(setUpInputAccordion);
  if (!uiIsLoaded && document.querySelector("#txt2img_prompt")) {
    uiIsLoaded = true;
    runCallbacks(uiLoadedCallbacks);
  }
}

function watchPage() {
  lookAtPage();
  const observer = new MutationObserver((mutations) => {
    lookAtPage();
    runCallbacks(uiUpdateCallbacks, mutations);
    clearTimeout(afterUpdateTimer);
    afterUpdateTimer = setTimeout(() => runCallbacks(uiAfterUpdateCallbacks), 200);
  });
  observer.observe(document.body, { childList: true, subtree: true });
}

// gradio 4 adds these scripts to a page that has been read already
if (document.readyState === "loading") {
  document.addEventListener("DOMContentLoaded", watchPage);
} else {
  watchPage();
}
