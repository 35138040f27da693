'use strict';
function copyByHand(text) {  // a page from the disk may have no clipboard
  const area = document.body.appendChild(document.createElement('textarea'));
  area.value = text;
  area.style.cssText = 'position: fixed; opacity: 0';
  area.select();
  try { return document.execCommand('copy') } catch { return false } finally { area.remove() }
}
async function copyCommand(button) {
  const code = button.previousElementSibling;
  let done = false;
  try { await navigator.clipboard.writeText(code.textContent); done = true } catch { done = copyByHand(code.textContent) }
  if (!done) getSelection().selectAllChildren(code);
  button.textContent = done ? 'Copied' : 'Selected: press Ctrl-C';
  button.focus();
  setTimeout(() => button.textContent = 'Copy', 2500);
}
for (const button of document.querySelectorAll('button.copy')) {
  button.hidden = false;
  button.setAttribute('aria-live', 'polite');
  button.addEventListener('click', () => copyCommand(button));
}
let folded = [];
addEventListener('beforeprint', () => {
  folded = [...document.querySelectorAll('details:not([open])')];
  for (const part of folded) part.open = true;
});
addEventListener('afterprint', () => { for (const part of folded) part.open = false });
