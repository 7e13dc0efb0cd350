"""The endpoints, one module per HTTP dialect.

To add a dialect, write a module here with an `APIRouter` called `router`, and list the module in `ROUTES` in
`runtime/api/application.py`. The endpoint declares its request and response as pydantic models, takes a
`RequestScorerDep`, turns the body into `RequestConversation`s and awaits `RequestScorer.score`. `scores.py` is the
shortest example. `responses=ERROR_RESPONSES` documents the errors.
"""
