// Sends requests to the service with the token that the user has entered.

const KEY = "hyperagent-token";

export class Refused extends Error {}

export const hasToken = () => sessionStorage.getItem(KEY) !== null;
export const keepToken = (token) => sessionStorage.setItem(KEY, token);
export const forgetToken = () => sessionStorage.removeItem(KEY);

export async function get(path) {
  const answer = await fetch(path, { headers: { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` }, cache: "no-store" });
  if (answer.status === 401) throw new Refused("the service refused the token");
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail);
  return body;
}
