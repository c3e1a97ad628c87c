import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Uploads, asks and deletes with the JDK's own client. Its default mode offers h2c with every request on plain HTTP.
 *
 * <p>Arguments: address of ingest, address of query. Prints one line for each exchange: mode, step, status, body.
 */
public final class Documents {
    private static final Duration TIMEOUT = Duration.ofSeconds(60);

    private final HttpClient client;
    private final String mode;
    private final String ingest;
    private final String query;

    private Documents(HttpClient.Version version, String ingest, String query) {
        this.client = HttpClient.newBuilder().version(version).connectTimeout(TIMEOUT).build();
        this.mode = version.name();
        this.ingest = ingest;
        this.query = query;
    }

    public static void main(String[] arguments) throws IOException, InterruptedException {
        for (HttpClient.Version version : HttpClient.Version.values()) {
            new Documents(version, arguments[0], arguments[1]).run();
        }
    }

    private void run() throws IOException, InterruptedException {
        upload("text", BodyPublishers.ofString("# Text\n\nThe " + mode + " otter signs.\n"), false);
        byte[] stream = ("# Stream\n\nThe " + mode + " heron signs.\n").getBytes(StandardCharsets.UTF_8);
        upload("stream", BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(stream)), false);
        upload("waiting", BodyPublishers.ofString("# Waiting\n\nThe " + mode + " stoat signs.\n"), true);
        String large = "# Large\n\n" + "No bird signs this line.\n\n".repeat(4_000) + "The " + mode + " lynx signs.\n";
        String position = upload("large", BodyPublishers.ofString(large), false);
        exchange("empty", put("text", BodyPublishers.noBody(), false));
        exchange("empty-text", put("text", BodyPublishers.ofString(""), false));
        String question = "{\"query\": \"What does the heron do?\", \"min_position\": \"" + position + "\"}";
        for (int time = 1; time <= 2; time++) {
            exchange("ask-" + time, json("/v1/query").POST(BodyPublishers.ofString(question)));
        }
        exchange("delete", at("text").DELETE());
    }

    private String upload(String name, BodyPublisher body, boolean expectContinue)
            throws IOException, InterruptedException {
        String accepted = exchange(name, put(name, body, expectContinue));
        Matcher position = Pattern.compile("\"position\": ?\"([^\"]+)\"").matcher(accepted);
        return position.find() ? position.group(1) : "";
    }

    private HttpRequest.Builder put(String name, BodyPublisher body, boolean expectContinue) {
        return at(name).header("Content-Type", "text/markdown").expectContinue(expectContinue).PUT(body);
    }

    private HttpRequest.Builder at(String name) {
        return HttpRequest.newBuilder(URI.create(ingest + "/v1/documents/" + mode + "-" + name));
    }

    private HttpRequest.Builder json(String path) {
        return HttpRequest.newBuilder(URI.create(query + path)).header("Content-Type", "application/json");
    }

    private String exchange(String step, HttpRequest.Builder request) throws IOException, InterruptedException {
        HttpResponse<String> response = client.send(request.timeout(TIMEOUT).build(), BodyHandlers.ofString());
        System.out.println(mode + "\t" + step + "\t" + response.statusCode() + "\t" + response.body());
        return response.body();
    }
}
