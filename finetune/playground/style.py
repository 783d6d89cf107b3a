"""The look of the page: system fonts, two columns that stack on a phone, light and dark.

Gradio sends every rule through the browser and back, which loses a ``border`` with a variable color and different
sides. So width, style and color are separate rules.
"""

STYLE = """
.gradio-container { --accent: #1d4ed8; --accent-soft: #dbeafe; --good: #15803d; --bad: #b91c1c; --bad-soft: #fef2f2;
  --line: #d4d8df; --quiet: #5b6472; --card: #ffffff; max-width: 76rem !important; margin: 0 auto; }
.dark .gradio-container, .dark.gradio-container, .dark { --accent: #93b4ff; --accent-soft: #1e2a47; --good: #6ee7a0;
  --bad: #fca5a5; --bad-soft: #3a1d1f; --line: #3a4250; --quiet: #a7b0be; --card: #171c26; }
.pg-head h1 { font-size: 1.55rem; font-weight: 650; margin: .3rem 0 .15rem; letter-spacing: -.01em; }
.pg-head p { margin: 0; color: var(--quiet); font-size: .95rem; }
.pg-head code { font-size: .9em; }
.pg-h2 { font-size: 1.15rem; font-weight: 650; margin: .2rem 0 .3rem; overflow-wrap: anywhere; }
.pg-right { margin: 0 0 .8rem; color: var(--quiet); font-size: .9rem; }
.pg-sr { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; white-space: nowrap; }
.html-container { padding: 0 !important; }
#image img.small { image-rendering: pixelated; width: 100% !important; height: 100% !important;
  object-fit: contain !important; }
#examples p { font-size: .88rem; color: var(--quiet); margin: 0; }
#examples .row { display: grid; grid-template-columns: repeat(6, minmax(0, 4rem)); gap: .5rem; }
#examples button { padding: 0; min-width: 0; font-size: 0; border-style: solid; border-width: 2px; line-height: 0;
  border-color: transparent; border-radius: .5rem; background: none; overflow: hidden; }
#examples button:hover, #examples button:focus-visible { border-color: var(--accent); }
#examples img { width: 100%; height: auto; margin: 0; image-rendering: pixelated; }
#again { width: auto; align-self: flex-start; flex: none; }
#ask { min-height: 2.9rem; font-size: 1.05rem; }

.pg-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem; }
.pg-card { border-style: solid; border-width: 4px 1px 1px; border-color: var(--line); border-radius: .75rem;
  padding: .9rem 1rem; background: var(--card); display: flex; flex-direction: column; gap: .35rem; min-width: 0; }
.pg-card.differs { border-top-color: var(--accent); }
.pg-card.failed { border-top-color: var(--bad); }
.pg-who { font-weight: 600; overflow-wrap: anywhere; }
.pg-who small { display: block; font-weight: 400; color: var(--quiet); }
.pg-answer { font-size: 1.9rem; line-height: 1.25; font-weight: 650; margin: .15rem 0; overflow-wrap: anywhere; }
.pg-answer.long { font-size: 1.1rem; font-weight: 450; line-height: 1.5; }
.pg-answer.waiting { color: var(--quiet); font-weight: 400; font-size: 1.1rem; }
.pg-marks { display: flex; flex-wrap: wrap; gap: .4rem; min-height: 1.6rem; }
.pg-chip { font-size: .8rem; padding: .1rem .55rem; border-radius: 1rem; border: 1px solid var(--line);
  color: var(--quiet); white-space: nowrap; }
.pg-chip.differs { background: var(--accent-soft); color: var(--accent); border-color: transparent; font-weight: 600; }
.pg-mark { font-size: .8em; margin-left: .3em; }
.pg-mark.right { color: var(--good); }
.pg-mark.wrong { color: var(--bad); }
.pg-time { font-size: .82rem; color: var(--quiet); font-variant-numeric: tabular-nums; margin-top: auto; }
.pg-empty { border: 1px dashed var(--line); border-radius: .75rem; padding: 2.2rem 1.2rem; color: var(--quiet);
  text-align: center; }
.pg-alert { border: 1px solid var(--bad); background: var(--bad-soft); border-radius: .75rem; padding: .85rem 1.1rem;
  overflow-wrap: anywhere; }
.pg-alert b, .pg-error b { color: var(--bad); }
.pg-error { font-size: .95rem; overflow-wrap: anywhere; margin: .15rem 0; }

.pg-table, .pg-table thead, .pg-table tbody, .pg-table tr { border-width: 0; }
.pg-table { width: 100%; border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
.pg-table th { text-align: left; font-weight: 600; color: var(--quiet); font-size: .82rem; }
.pg-table th, .pg-table td { padding: .55rem .8rem .55rem 0; border-style: solid; border-color: var(--line);
  border-width: 0 0 1px; vertical-align: top; }
.pg-table tr.refused td { color: var(--quiet); }
.pg-table tr.refused .pg-name { text-decoration: line-through; text-decoration-thickness: 1px; }
.pg-name { font-weight: 600; overflow-wrap: break-word; }
.pg-table small { display: block; color: var(--quiet); }
.pg-table .pg-chip { margin-right: .25rem; }
.pg-after { font-weight: 650; }
.pg-bar { display: block; position: relative; height: .45rem; width: 9rem; max-width: 100%; border-radius: .3rem;
  background: var(--line); margin-top: .3rem; overflow: hidden; }
.pg-bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); }
.pg-bar i + i { background: var(--quiet); }
.pg-no { color: var(--bad); font-weight: 600; }
.pg-yes { color: var(--good); font-weight: 600; }
.pg-foot { color: var(--quiet); font-size: .88rem; border-top: 1px solid var(--line); padding-top: .8rem; }
.pg-foot p { margin: 0 0 .3rem; }

@media (max-width: 46rem) {
  .pg-cards { grid-template-columns: 1fr; }
  .pg-answer { font-size: 1.6rem; }
  .pg-table thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  .pg-table, .pg-table tbody, .pg-table tr, .pg-table td { display: block; }
  .pg-table tr { border-style: solid; border-width: 1px; border-color: var(--line);
    border-radius: .75rem; padding: .4rem .9rem; margin-bottom: .8rem; }
  .pg-table td { border-width: 0; padding: .3rem 0; display: grid; grid-template-columns: 6.5rem 1fr; gap: .6rem; }
  .pg-table td::before { content: attr(data-label); color: var(--quiet); font-size: .82rem; padding-top: .1rem; }
}
"""

# On a phone the answers are below the button.
SHOW_ANSWERS = """() => {
  if (matchMedia("(max-width: 46rem)").matches) document.getElementById("answers").scrollIntoView();
}"""
# A screen reader announces new answers.
ANNOUNCE_ANSWERS = """() => { document.getElementById("answers").setAttribute("aria-live", "polite"); }"""
# An image of few pixels is shown without smoothing.
SCRIPT = """<script>
document.addEventListener("load", (event) => {
  const seen = event.target;
  if (seen instanceof HTMLImageElement) seen.classList.toggle("small", seen.naturalWidth <= 128);
}, true);
</script>"""
