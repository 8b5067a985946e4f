"""What a run's page looks like, and what answers a pointer there: kept inside the page."""

CSS = """
:root{color-scheme:light dark;--back:#fbfbfa;--card:#fff;--ink:#1f2328;--soft:#656d76;
--edge:#e3e5e8;--grid:#eceef0;--c0:#1f6feb;--c1:#d9480f;--c2:#2b8a3e;--c3:#9c36b5;--c4:#b58900;--c5:#0b7285;
--good:#1a7f37;--bad:#c92a2a;--wait:#9a6700;--changed:#fff4d6}
@media(prefers-color-scheme:dark){:root{--back:#0f1216;--card:#171b21;--ink:#e6e9ed;--soft:#98a2ad;
--edge:#2a3038;--grid:#242a32;--c0:#6cb2ff;--c1:#ff9a66;--c2:#63d07c;--c3:#d89bf0;--c4:#e3c04f;
--c5:#55cddb;--good:#56d364;--bad:#ff7b72;--wait:#e3b341;--changed:#3a3116}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,
-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:17px;margin:36px 0 12px}
p{margin:0 0 8px}small,.soft{color:var(--soft)}
.state{display:inline-block;padding:1px 10px;border-radius:99px;border:1px solid;font-size:13px;
font-weight:600;color:var(--wait)}.state.done{color:var(--good)}.state.error{color:var(--bad)}
.why{border-left:3px solid var(--bad);padding:6px 12px;margin:12px 0;overflow-wrap:anywhere;
white-space:pre-wrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:10px;
margin:18px 0 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--edge);border-radius:10px;
padding:10px 14px}.tiles dt{color:var(--soft);font-size:13px}.tiles dd{margin:0;
white-space:nowrap;font-size:17px;font-weight:600;line-height:1.35;font-variant-numeric:tabular-nums}
.tiles dd small{display:block;white-space:normal;
font-size:13px;font-weight:400;line-height:1.4}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:14px}
figure{margin:0 0 14px;background:var(--card);border:1px solid var(--edge);border-radius:10px;
padding:12px 16px 34px;min-width:0}.charts figure{margin:0}
figcaption{font-weight:600;margin-bottom:6px}figcaption small{font-weight:400}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 8px;padding:0;
font-size:13px;color:var(--soft)}.legend li::before{content:"";display:inline-block;width:16px;
height:0;border-top:3px solid var(--line);vertical-align:middle;margin-right:6px}
.legend .faint::before{opacity:.5}
.plot{position:relative;height:170px;margin-left:50px;cursor:crosshair;touch-action:pan-y}
.wide .plot{height:300px}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path,.plot polyline{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.plot .grid{stroke:var(--grid);stroke-width:1}
.plot .across{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:6 5}
.plot .bars rect{fill:var(--c0);stroke:var(--card);stroke-width:1;vector-effect:non-scaling-stroke}
.plot polyline{stroke:var(--line);stroke-width:2}.plot .faint{stroke-width:1;opacity:.5}
.plot .dots{stroke-width:1.5}.plot .band{fill:var(--line);opacity:.14}
.legend .band::before{border-top-width:9px;opacity:.25}
.plot .dot{stroke:var(--line);stroke-width:7;stroke-linecap:round}
.plot span{position:absolute;font-size:12px;line-height:1;color:var(--soft);white-space:nowrap;
font-variant-numeric:tabular-nums;pointer-events:none}
.plot .y{right:100%;margin-right:8px;transform:translateY(50%)}
.plot .x{top:100%;margin-top:9px;transform:translateX(-50%)}
.plot .rule{right:0;margin-bottom:4px;color:var(--bad)}
.plot .limit{top:2px;margin-right:6px;color:var(--bad)}
.plot .mark{width:0;height:0}.plot .mark::before{content:"";position:absolute;left:-7px;top:-7px;
width:10px;height:10px;border:2px solid var(--line);border-radius:50%;background:var(--card)}
.plot .mark b{position:absolute;bottom:12px;left:-6px;color:var(--line);font-weight:600;
text-shadow:0 0 3px var(--card),0 0 3px var(--card),0 0 3px var(--card)}
.plot .mark.left b{left:auto;right:-6px}
.plot .tip{display:none;z-index:2;background:var(--card);border:1px solid var(--edge);
border-radius:6px;padding:7px 9px;line-height:1.5;color:var(--ink);white-space:pre;top:6px;
box-shadow:0 2px 8px #0003}
.plot .hair{display:none;top:0;bottom:0;width:0;border-left:1px solid var(--soft)}
.c0{--line:var(--c0)}.c1{--line:var(--c1)}.c2{--line:var(--c2)}.c3{--line:var(--c3)}
.c4{--line:var(--c4)}.c5{--line:var(--c5)}
.samples article{background:var(--card);border:1px solid var(--edge);border-radius:10px;
padding:12px 16px;margin-bottom:14px}.text{white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{border-left:3px solid var(--edge);padding-left:12px;color:var(--soft);max-height:16em;
overflow:auto}
.samples ol{list-style:none;margin:12px 0 0;padding:0}.samples li{display:grid;
grid-template-columns:88px 1fr;gap:0 12px;padding:6px 0;border-top:1px solid var(--edge)}
.samples li>small{font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--edge);
border-radius:10px;font-size:14px}td,th{padding:5px 12px;border-top:1px solid var(--edge);
text-align:left;vertical-align:top;overflow-wrap:anywhere}tr:first-child>*{border-top:0}
th{font-weight:400;color:var(--soft);width:36%}th[scope=col]{width:auto}
.changed td,.changed th{background:var(--changed);color:var(--ink)}
.wider{overflow-x:auto;margin-top:6px}.wider table{min-width:760px}.kept th{width:auto;
overflow-wrap:normal}.kept th.n{max-width:130px;white-space:normal}
.kept td{max-width:340px}.kept .text{min-width:170px;max-height:14em;overflow:auto}
.kept .prompt{padding-left:8px}
.kept .n{white-space:nowrap;font-variant-numeric:tabular-nums;text-align:right}
.kept .gap td{text-align:center;padding:1px}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft);padding:4px 0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:0 14px}
@media(max-width:560px){main{padding:18px 12px 40px}.plot{margin-left:44px}.wide .plot{height:230px}
figure{padding:10px 12px 32px}.samples li{grid-template-columns:1fr}
.tiles{grid-template-columns:repeat(2,1fr)}.tiles dd{font-size:17px}}
"""

SCRIPT = """
const say=v=>{const a=Math.abs(v);return a&&(a<1e-3||a>=1e7)?v.toExponential(2):
a>=1000?Math.round(v).toLocaleString("en"):String(+v.toPrecision(4))};
for(const plot of document.querySelectorAll(".plot[data-ends]")){
const [x0,x1,y0,y1]=plot.dataset.ends.split(" ").map(Number);
const lines=[...plot.querySelectorAll("polyline")].map(l=>({name:l.dataset.name,
at:l.getAttribute("points").split(" ").map(p=>p.split(",").map(Number))}));
const add=c=>{const s=document.createElement("span");s.className=c;plot.append(s);return s};
const hair=add("hair"),tip=add("tip");
const hide=()=>{hair.style.display=tip.style.display="none"};
const show=e=>{const box=plot.getBoundingClientRect();
const want=Math.min(1,Math.max(0,(e.clientX-box.left)/box.width))*1000;
const near=lines.map(l=>l.at.reduce((a,b)=>Math.abs(b[0]-want)<Math.abs(a[0]-want)?b:a));
const x=near.reduce((a,b)=>Math.abs(b[0]-want)<Math.abs(a[0]-want)?b:a)[0];
const step=p=>Math.round(x0+p/1000*(x1-x0));
tip.textContent="step "+step(x).toLocaleString("en")+near.map((p,i)=>"\\n"+lines[i].name+
(step(p[0])==step(x)?"":" at "+step(p[0]).toLocaleString("en"))+"  "+
say(y0+(1-p[1]/1000)*(y1-y0))).join("");
hair.style.left=x/10+"%";tip.style.left=x<500?`calc(${x/10}% + 10px)`:"auto";
tip.style.right=x<500?"auto":`calc(${100-x/10}% + 10px)`;
hair.style.display=tip.style.display="block"};
plot.addEventListener("pointermove",show);plot.addEventListener("pointerdown",show);
plot.addEventListener("pointerleave",hide)}
"""
