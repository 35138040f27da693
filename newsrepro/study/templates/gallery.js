'use strict';
const at = id => document.getElementById(id), BATCH = 20, sets = {};
let set = {runs: [], ranked_by: [], pictures: [], articles: []}, shown = [], drawn = 0;

{% include 'cards.js' %}

function show(data) {  // called by the script of a set
  data.articles = data.articles.map(([id, title, text, truth, ranks, lists]) =>
    ({id, title, text, truth, ranks, lists, words: [id, title, text].join(' ').toLowerCase()}));
  sets[document.currentScript.getAttribute('src')] = data;
}
const choice = id => Number(at(id).value);
const place = rank => rank || 101;  // 0: not among the first hundred
const gain = one => 1/place(one.ranks[choice('run')]) - 1/place(one.ranks[choice('other')]);
const ranked = one => one.ranks[choice('run')] !== null;
const compared = one => ranked(one) && choice('other') >= 0 && one.ranks[choice('other')] !== null;

function picture(list, number, score, label, own) {
  const [id, file, thumb] = set.pictures[number];
  const item = element('li', '', list, own ? {class: 'own'} : {});
  if (thumb) element('img', '', item, {src: thumb, alt: `Picture ${file}`, loading: 'lazy', decoding: 'async', width: 144, height: 108});
  else element('span', 'cannot be read', item, {class: 'gone'});
  element('b', `${label} `, item);
  element('span', score === undefined ? id : `${id} (${score})`, item, {title: file});
}
function listOf(one, run, part) {
  const head = element('h3', set.runs[run], part), lists = one.lists[run];
  element('span', set.ranked_by[run] ? ` · score: ${set.ranked_by[run]}` : ' · no scores kept', head, {class: 'soft'});
  const list = element('ol', '', part, {tabindex: 0, 'aria-label': `Pictures of ${set.runs[run]} for ${one.title || one.id}`});
  const own = lists.find(([number]) => number === one.truth) ?? [];
  if (one.truth >= 0) picture(list, one.truth, own[1], `true${one.ranks[run] === null ? '' : one.ranks[run] ? `, rank ${one.ranks[run]}` : ', not listed'}`, true);
  lists.forEach(([number, score], k) => { if (number !== one.truth) picture(list, number, score, `${k + 1}.`, false) });
  if (!lists.length) element('li', 'no list in this run', list);
}
function card(one) {
  const part = element('article', '', at('articles'));
  element('h2', one.title || one.id, part);
  element('div', one.id, part, {class: 'soft'});
  if (one.text) element('p', one.text, part);
  const ranks = element('ul', '', part, {class: 'ranks', 'aria-label': 'Rank of the true picture under each run'});
  const papers = {};
  one.ranks.forEach((rank, run) => {
    const [paper, name] = set.runs[run].split(': '), own = run === choice('run') || run === choice('other');
    const line = papers[paper] ||= element('li', `${paper}:`, ranks, {class: 'soft'});
    element('span', `${name || paper} ${rank === null ? '–' : rank || '>100'}`, line, own ? {class: 'chosen'} : {});
  });
  listOf(one, choice('run'), part);
  if (choice('other') >= 0) listOf(one, choice('other'), part);
}
function drawMore() {
  for (const one of shown.slice(drawn, drawn + BATCH)) card(one);
  drawn = Math.min(drawn + BATCH, shown.length);
  at('more').hidden = drawn >= shown.length;
}
const filters = {
  all: () => true,
  first: one => one.ranks[choice('run')] === 1,
  ten: one => ranked(one) && place(one.ranks[choice('run')]) > 10,
  lost: one => one.ranks[choice('run')] === 0,
  improved: one => compared(one) && gain(one) > 0,
  worsened: one => compared(one) && gain(one) < 0,
};
const last = one => ranked(one) ? place(one.ranks[choice('run')]) : Infinity;
const by = key => (a, b) => key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0;
const orders = {
  given: by(one => ranked(one) ? 0 : 1),  // a sample's articles before those that the run leaves out
  worst: by(one => ranked(one) ? -last(one) : 1),
  best: by(last),
  gain: by(one => compared(one) ? -gain(one) : Infinity),
  loss: by(one => compared(one) ? gain(one) : Infinity),
  id: (a, b) => a.id.localeCompare(b.id, undefined, {numeric: true}),
};
function look() {
  const words = at('words').value.toLowerCase().split(/\s+/).filter(Boolean), order = orders[at('order').value];
  shown = set.articles.filter(one => words.every(word => one.words.includes(word)) && filters[at('only').value](one));
  shown.sort(order);
  drawn = 0;
  at('articles').replaceChildren();
  drawMore();
  at('count').textContent = `${shown.length} of ${set.articles.length} articles`;
}
function needsOther() {  // an order by difference wants something to differ from
  const asked = ['improved', 'worsened'].includes(at('only').value) || ['gain', 'loss'].includes(at('order').value);
  if (asked && choice('other') < 0 && set.runs.length > 1) at('other').value = choice('run') === 0 ? 1 : 0;
}
function options(id, names, none) {  // the runs under their papers; what was chosen before stays so
  const before = set.runs[choice(id)], papers = {};
  at(id).replaceChildren();
  if (none) element('option', none, at(id), {value: -1});
  names.forEach((name, k) => {
    const [paper, run] = name.split(': ');
    element('option', run || paper, papers[paper] ||= element('optgroup', '', at(id), {label: paper}), {value: k});
  });
  at(id).value = Math.max(names.indexOf(before), none ? -1 : 0);
}
function use(data) {
  options('run', data.runs);
  options('other', data.runs, 'nothing');
  set = data;
  look();
}
function load() {
  const file = at('set').value;
  if (sets[file]) return use(sets[file]);
  at('count').textContent = 'loading';
  const script = element('script', '', document.head, {src: file});
  script.addEventListener('load', () => { if (at('set').value === file) use(sets[file]) });
  script.addEventListener('error', () => at('count').textContent = `${file} is not there`);
}
let waiting;
at('words').addEventListener('input', () => { clearTimeout(waiting); waiting = setTimeout(look, 120) });
at('set').addEventListener('change', load);
for (const id of ['run', 'other', 'only', 'order']) at(id).addEventListener('change', () => { needsOther(); look() });
at('more').addEventListener('click', drawMore);
new IntersectionObserver(seen => { if (seen.some(one => one.isIntersecting) && drawn) drawMore() }, {rootMargin: '800px'}).observe(at('more'));
load();
