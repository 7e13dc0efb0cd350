"""The HTTP API.

A request passes `in_flight` (counting, log), `access` (key, Host, Origin), `limits` (body), its module in `routes`,
`scoring` (limits, rendering), `service` (model by name) and `batcher` (queue), whose thread calls
`runtime.scorer.Scorer`.
`application` builds all of it, `server` runs it.
"""
