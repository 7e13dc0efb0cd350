// A file of its own because the Content-Security-Policy of /docs forbids inline scripts.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // no validator badge, which is fetched from swagger.io
});
