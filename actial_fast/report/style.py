"""The look of report.html: colours for light and dark, one style sheet."""

from actial_fast.report.chart import COLOURS

LIGHT = ("#0b6fc2", "#d1590b", "#16875a", "#a2408f", "#8a6d00", "#3d8fa8", "#b3363e")
DARK = ("#5db0f5", "#f59b55", "#4fc795", "#de8bce", "#dcbf4d", "#7fcbe0", "#f0878c")
assert len(LIGHT) == len(DARK) == COLOURS

CSS = (
    f":root{{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#667079;--edge:#dfe3e8;--card:#f7f8fa;--good:#16794f;--bad:#b3262e;"
    f"{''.join(f'--c{i}:{c};' for i, c in enumerate(LIGHT))}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{--bg:#14171b;--fg:#e4e8ec;--dim:#98a2ad;--edge:#2d333b;--card:#1b1f25;"
    f"--good:#55cf98;--bad:#f58088;{''.join(f'--c{i}:{c};' for i, c in enumerate(DARK))}}}}}"
    """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1160px;padding:36px 28px 80px;background:var(--bg);color:var(--fg);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:32px;line-height:1.2;margin:2px 0 14px}
h2{font-size:20px;margin:44px 0 14px;padding-bottom:6px;border-bottom:1px solid var(--edge)}
h3{font-size:15px;margin:18px 0 4px}p{margin:6px 0}.lead{font-size:18px;max-width:54em}.muted,small{color:var(--dim)}small{font-size:12px}
.muted{font-size:13px}.lead .muted{font-size:15px}.bad{color:var(--bad)}.good{color:var(--good)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:26px 28px}
figure{margin:0;display:flex;flex-direction:column}.whole{grid-column:1/-1;overflow-x:auto}.whole svg{min-width:640px}
figcaption{font-weight:600;font-size:14px;display:flex;flex-wrap:wrap;gap:2px 8px;align-items:baseline}svg{margin-top:auto}
figure{position:relative}figure svg{touch-action:pan-y pinch-zoom}svg:focus-visible{outline:1px solid var(--dim);outline-offset:4px}
.tools{margin-left:auto;display:flex;gap:4px}.tools>*,.choices>*{font:inherit;color:inherit;background:var(--card);
 border:1px solid var(--edge);border-radius:5px}.tools>*{font-size:11.5px;font-weight:400;padding:0 6px;color:var(--dim);cursor:pointer}
.tools [aria-pressed=true]{color:var(--fg);border-color:var(--dim)}[hidden]{display:none!important}
.legend [role=button]{cursor:pointer}.legend [aria-pressed=false]{opacity:.4;text-decoration:line-through}
.told{position:absolute;z-index:2;pointer-events:none;background:var(--card);border:1px solid var(--edge);border-radius:6px;padding:5px 9px;
 font-size:12px;box-shadow:0 2px 8px #0003;max-width:100%}.told span{display:block}.told>b{display:block}
.told i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:6px}
svg .here{stroke:var(--dim);stroke-dasharray:2 2}svg .chosen{fill:var(--c0);opacity:.15}
.legend{font-size:12px;color:var(--dim)}.legend span{margin-right:12px;white-space:nowrap}.legend b{color:var(--fg);font-weight:600}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:5px;vertical-align:3px}
.legend i.dash{height:0;border-top:2px dashed var(--dim);border-radius:0}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{font-size:10.5px;fill:var(--dim)}
svg .stage{font-weight:600;fill:var(--fg)}
svg .grid{stroke:var(--edge)}svg .rule{stroke:var(--dim)}svg .guide{stroke:var(--dim);stroke-width:1.3;stroke-dasharray:5 4}
svg path{fill:none;stroke-linejoin:round;stroke-linecap:round}svg .raw{stroke-width:1;opacity:.3}svg .line{stroke-width:1.9}
.wide{overflow-x:auto}table{border-collapse:collapse}.lead .muted{white-space:nowrap}
.figures th,.figures td{padding:3px 10px 3px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--edge);font-size:13.5px}
.figures th:first-child,.figures .share,.figures .moment{text-align:left}.figures tbody th{font-weight:500}
.figures thead th{color:var(--dim);font-weight:500;font-size:12px;vertical-align:bottom}.figures thead tr:first-child th{border-bottom:0}
.figures .share,.figures .moment{padding-left:4px}.figures .first,.figures .moment{border-left:1px solid var(--edge);padding-left:12px}
.figures thead .moment{color:var(--fg);font-weight:600;font-size:13px}.figures tr.all>*{border-bottom:0;font-weight:600}
.figures tbody>tr>*{vertical-align:baseline}.figures tbody small{display:block;font-size:11.5px;line-height:1.2}
.figures small{font-weight:400}.figures .moment small{display:block;white-space:normal}
.figures thead .share{line-height:1.3}.figures td.share>b{display:inline-block;min-width:3.3em;font-weight:600}
.bar{display:inline-block;position:relative;height:6px;width:48px;margin:0 6px;vertical-align:2px;border-radius:3px;
 background:var(--edge)}
.bar i{position:absolute;top:0;height:6px;background:var(--c0);opacity:.4;border-radius:3px}
.bar u{position:absolute;top:-2px;height:10px;border-left:1.5px solid var(--dim)}
.bar b{position:absolute;top:-1px;width:8px;height:8px;margin-left:-4px;border-radius:50%;background:var(--c0)}
.texts td,.texts th{white-space:normal;overflow-wrap:anywhere;text-align:left!important;vertical-align:top!important}
details{margin:16px 0}summary{cursor:pointer;font-weight:600;font-size:14px}details>*{margin-top:12px}
pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
details>pre{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:14px 16px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:18px;align-items:start}
article{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:14px}article pre{max-height:16em;overflow:auto}
.images{display:flex;gap:8px;margin-bottom:10px;flex-wrap:wrap}.images img{height:112px;max-width:100%;border-radius:4px}
.images img.pixels{image-rendering:pixelated}.lost{font-size:12px;color:var(--bad);border:1px dashed;padding:8px;border-radius:4px}
.reply{border-top:1px solid var(--edge);padding-top:8px;margin-top:8px}.marks{display:flex;gap:12px;font-size:12.5px;margin-bottom:4px}
.marks span:last-child{margin-left:auto}
article p{font-size:13px}dl{display:grid;grid-template-columns:minmax(100px,max-content) 1fr;gap:3px 22px;margin:0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
.choices{display:flex;flex-wrap:wrap;gap:8px;margin:10px 0 16px}.choices>*{padding:3px 8px;max-width:100%}
.choices output{border:0;background:none}article>.muted:first-child{margin:0 0 6px}
.figures .change b.muted{color:inherit;font-size:inherit}
.contents{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:18px;font-size:13px}
.contents a{color:var(--c0);text-decoration:none}
.contents a:hover{text-decoration:underline}.changes{margin:2px 0 12px;padding-left:20px}
@media(max-width:640px){
body{padding:20px 16px 60px}h1{font-size:26px;overflow-wrap:anywhere}h2{margin-top:34px}ul{padding-left:18px}
.lead .muted{white-space:normal}svg text{font-size:15px}.whole svg text{font-size:13px}figcaption .tools{margin-left:0}
.tools>*{font-size:14px;padding:3px 9px}
.narrow thead{display:none}.narrow,.narrow tbody,.narrow tr,.narrow tbody th,.narrow td{display:block}
.figures.narrow tr{border:1px solid var(--edge);border-radius:8px;padding:6px 12px;margin:8px 0}
.figures.narrow tbody th{font-weight:600;border:0}.figures.narrow td{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 8px;border:0;
 padding:2px 0;white-space:normal;text-align:left}
.narrow td::before{content:attr(data-label);color:var(--dim);flex:1 1 9em}.figures.narrow td small{display:inline}
.figures.narrow td:not([class]){display:inline-flex;margin-right:16px}.narrow.figures td:not([class])::before{flex:none}
.texts.narrow td:not([class]){display:flex}.narrow td .bar{display:none}dl{grid-template-columns:1fr}dd{margin-bottom:6px}
}
@media print{.contents,.tools,.told,.choices,details:not([open]){display:none}body{max-width:none;padding:0}
figure,article,tr,li{break-inside:avoid}
h2,h3{break-after:avoid}.grid{grid-template-columns:1fr 1fr;gap:14px 18px}.whole svg{min-width:0}article pre{max-height:none}
.wide{overflow:visible}.figures{font-size:11px}.figures th,.figures td{font-size:11px;padding-right:5px}.bar{width:30px}}
"""
)
