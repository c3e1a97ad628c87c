import sys, uvloop
from infra.settings import Settings

a = sys.argv[1:]
if a[0] == "worker":
    from streams.worker import work
    from streams.topology import StepName

    uvloop.run(work(Settings(), [StepName(x) for x in a[1:]] or list(StepName)))
elif a[1] == "ingest":
    from ingest.main import serve

    uvloop.run(serve(Settings()))
else:
    from query.main import serve

    uvloop.run(serve(Settings()))
