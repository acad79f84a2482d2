"""The style sheet of pages that open from disk. Colours are named once for each scheme; --run is the colour of the run that a thing belongs to."""

STYLE = """
:root{color-scheme:light dark;--page:#fcfcfa;--raised:#fff;--ink:#1a1c1f;--muted:#5b6168;--rule:#dfe0dc;--faint:#ecece8;--link:#0b5cad;
--right:#0b6e4f;--wrong:#b3261e;--c0:#0b5cad;--c1:#c2410c;--c2:#0b7a57;--c3:#8636a8;--c4:#8a6100;--c5:#0a7285;--c6:#b8206a;--c7:#4b5563}
@media(prefers-color-scheme:dark){:root{--page:#131518;--raised:#1a1d21;--ink:#e9eaec;--muted:#a3a9b1;--rule:#33383e;--faint:#262a2f;--link:#79b8ff;
--right:#5fd3a4;--wrong:#ff8f85;--c0:#6db3f8;--c1:#ff9a66;--c2:#52cfa0;--c3:#d09bf0;--c4:#e0b354;--c5:#5ccadb;--c6:#ff8fbb;--c7:#b3bcc8}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:56px}
h1{font-size:clamp(28px,4.4vw,42px);line-height:1.12;letter-spacing:-.02em;margin:0 0 16px;font-weight:680;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:24px;letter-spacing:-.012em;line-height:1.2;margin:0 0 20px;font-weight:660}
h3{font-size:17px;line-height:1.3;margin:0 0 4px;font-weight:640}
p{margin:0 0 .7em;overflow-wrap:anywhere}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:3px;border-radius:3px}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:0;padding:0}
nav a{display:inline-block;padding:6px 0;text-underline-offset:4px;text-decoration-thickness:1px}
main>section{border-top:1px solid var(--rule);margin-top:36px;padding-top:32px}
main{padding-bottom:72px}
.hidden{position:absolute}
#summary p{max-width:44em;font-size:18px}
.note{color:var(--muted);font-size:14px;line-height:1.45;max-width:46em}
.scroll{overflow-x:auto;margin:0 0 8px}
.scroll+.note{margin-bottom:30px}
.scroll+.scroll,.gallery+.scroll{margin-top:30px}
table{border-collapse:collapse;min-width:100%;font-size:15px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:640;font-size:17px;padding:0 0 8px}
th,td{padding:9px 0 9px 28px;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--rule)}
th:first-child{padding-left:0;white-space:nowrap;position:sticky;left:0;background:var(--page)}
thead th{color:var(--muted);font-weight:500;font-size:13.5px;line-height:1.3;vertical-align:bottom;border-bottom-color:var(--muted)}
tbody th{font-weight:600}
.number{text-align:right;white-space:nowrap}
thead .number{white-space:normal}
.pass{color:var(--right)}
.fail{color:var(--wrong);font-weight:600}
.validation{margin:36px 0 40px}
.metric{margin:0;min-width:0}
.metrics{display:grid;gap:44px 40px;margin-top:24px}
.alone{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));row-gap:0}
.alone .metric{display:grid;grid-row:span 4;grid-template-rows:subgrid;align-content:start;margin-bottom:36px}
.alone .note{margin-bottom:0}
.alone .panels{grid-row:4}
.beside .panels{display:grid;gap:20px 28px;grid-template-columns:repeat(var(--runs),minmax(0,1fr))}
figure{margin:0;min-width:0}
figcaption{display:flex;align-items:center;gap:7px;font-size:14px;font-weight:600;line-height:1.3;margin-top:8px;min-width:0;overflow-wrap:anywhere}
figcaption svg{flex:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 20px;margin:6px 0 0;padding:0;font-size:13.5px}
.legend li{display:flex;align-items:center;gap:7px}
.none .note{margin-top:10px;font-style:italic}
.outside{margin:-4px 0 0 42px;font-size:12px}
.r0{--run:var(--c0)}.r1{--run:var(--c1)}.r2{--run:var(--c2)}.r3{--run:var(--c3)}.r4{--run:var(--c4)}.r5{--run:var(--c5)}.r6{--run:var(--c6)}.r7{--run:var(--c7)}
svg.chart{display:block;overflow:visible;width:calc(100% - 50px);height:132px;margin:34px 8px 30px 42px}
.reading{transform:translateX(var(--shift,-42px))}
.validation svg.chart{height:290px;width:calc(100% - 200px);margin-right:164px}
.alone svg.chart{height:150px}
svg text{font-size:11.5px;fill:var(--muted);font-variant-numeric:tabular-nums}
.y{text-anchor:end}
.grid{stroke:var(--faint);stroke-width:1}
.mark{stroke:var(--rule);stroke-width:1}
.reference{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 4}
path.solid,path.dashed,path.dotted,path.faint{fill:none;stroke:var(--run,var(--ink));stroke-width:2;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}
path.dashed,path.dotted{stroke:var(--ink);stroke-width:1.75}
path.dashed{stroke-dasharray:5 4;stroke-linecap:butt}
path.dotted{stroke-dasharray:.1 4.5;stroke-width:2.25}
path.faint{stroke-width:1;opacity:.28}
figcaption svg,.marker{fill:var(--run)}
.marker{stroke:var(--page);stroke-width:1.5;paint-order:stroke}
.dot{fill:var(--run)}
.dot.dashed,.dot.dotted{fill:var(--ink)}
.ends{overflow:visible}
.lead{stroke:var(--muted);stroke-width:1;opacity:.6}
.ends .name{font-size:13px;fill:var(--ink);font-weight:600}
.ends .value,.reading .value{fill:var(--ink);font-weight:500}
.reading .value[class*=" r"]{fill:var(--run)}
.readings g text,.readings line{visibility:hidden}
.readings g:hover text,.readings g:hover line{visibility:visible}
.readings rect{fill:transparent}
.readings line{stroke:var(--muted);stroke-width:1}
.readings:hover+.last{visibility:hidden}
.gallery{list-style:none;margin:0;padding:0;display:grid;gap:20px;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr))}
article{background:var(--raised);border:1px solid var(--rule);border-radius:10px;overflow:hidden;height:100%}
.picture{background:var(--faint);display:flex;justify-content:center;padding:14px}
img{display:block;width:auto;height:160px;max-width:100%;object-fit:contain}
img.small{image-rendering:pixelated}
.question{font-size:16px;font-weight:600;margin:0;padding:14px 16px 4px;white-space:pre-line;overflow-wrap:anywhere;unicode-bidi:isolate}
.truth{margin:0;padding:0 16px 10px;font-size:15px}
.who{color:var(--muted);font-size:13.5px}
.choices{padding:0 16px;margin:0 0 4px;font-size:15px;line-height:1.4;white-space:pre-line;unicode-bidi:isolate}
.answers{list-style:none;margin:0;padding:6px 16px 12px;border-top:1px solid var(--rule);display:grid;grid-template-columns:14px fit-content(45%) 1fr;gap:0 9px}
.answers li{display:grid;grid-column:1/-1;grid-template-columns:subgrid;align-items:baseline;padding:3px 0;font-size:15px}
.sign{width:14px;height:14px;align-self:center;fill:none;stroke-width:2.4;stroke-linecap:round;stroke-linejoin:round}
.answers .who{overflow-wrap:anywhere}
.said,.truth span{overflow-wrap:anywhere;unicode-bidi:isolate}
.right .sign{stroke:var(--right)}
.wrong .sign{stroke:var(--wrong)}
.wrong .said{color:var(--wrong)}
.empty{font-style:italic}
@media(max-width:900px){.beside .panels{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media(max-width:600px){th,td{padding-left:14px}th:first-child{white-space:normal;min-width:8.5em}
header,main{padding:0 16px}header{padding-top:32px}main{padding-bottom:48px}.beside .panels{gap:16px 14px}
.beside .reading{--shift:-51px}.beside .reading .step{display:none}.validation svg.chart{width:calc(100% - 166px);margin-right:124px;height:240px}
#summary p{font-size:17px}
.validation .reading .key,.unit,.validation .spare{display:none}}
@media print{body{background:#fff}article,figure,tr{break-inside:avoid}nav{display:none}}
"""
